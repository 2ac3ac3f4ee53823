"""The Ray backend: one worker process per stage, placed by its devices' kind, messages over TCP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autopar.core.errors import BadInput
from autopar.core.plan import Plan
from autopar.core.program import Program
from autopar.runtime.ray_backend.nodes import Nodes
from autopar.runtime.ray_backend.session import RaySession

__all__ = ["Ray", "RaySession"]


@dataclass(frozen=True)
class Ray:
    """A backend that runs every stage in a process of its own on a Ray cluster.

    A node offers its devices as a custom resource that is called as their kind:
    `ray start --resources='{"T4": 4}'`. Workers of all stages get their devices at once, or none does. They
    need autopar installed, and nothing of the user's code. They send each other tensors over TCP, on their
    nodes' addresses; connections are authenticated, not encrypted.

    Attributes:
        address: of a running cluster; None: the one this process or machine belongs to.
        emulate: make up the plan's nodes on this machine, with host devices, and stop them at the end.
            Everything then listens on 127.0.0.1 only. A process that has called `ray.init` itself stays on
            that cluster.
        platform: "cpu" or "cuda"; None: "cpu" when emulating, else "cuda".
        timeout: seconds a stage waits for another's message, and the driver for a worker, before giving up.
        cache: folder, reachable from all nodes, that keeps compiled programs; None: a temporary one when
            emulating, else none.
    """

    address: str | None = None
    emulate: bool = False
    platform: str | None = None
    timeout: float = 300.0
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.emulate and self.address is not None:
            raise BadInput(f"Ray(emulate=True) makes up a cluster; leave out address={self.address!r}")
        if self.platform not in (None, "cpu", "cuda"):
            raise BadInput(f'Ray(platform=…) is "cpu" or "cuda", not {self.platform!r}')
        if not self.timeout > 0:
            raise BadInput(f"Ray(timeout=…) takes seconds above 0, not {self.timeout!r}")

    def start(self, plan: Plan, program: Program, traced: Any) -> RaySession:
        """Returns a session, all segments compiled.

        Raises:
            BackendError: the cluster cannot be reached, lacks devices, or its workers don't start.
            NotImplementedError: a stage spans several nodes.
        """
        for s, stage in enumerate(plan.stages):
            if len(stage.nodes) > 1:
                raise NotImplementedError(
                    f"stage {s} spans the nodes {', '.join(stage.nodes)}; the Ray backend runs a stage on "
                    "one node: ask for more stages, or run the plan with InProcess()"
                )
        nodes = Nodes(plan, self.address, self.emulate)
        platform = self.platform or ("cpu" if self.emulate else "cuda")
        return RaySession(plan, program, traced, nodes, platform, self.timeout, self.cache)
