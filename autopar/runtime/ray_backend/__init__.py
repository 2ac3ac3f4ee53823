"""The Ray backend: one worker process per stage, placed by its devices' kind, messages over TCP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autopar.core.plan import Plan
from autopar.core.program import Program
from autopar.runtime.ray_backend.nodes import Nodes
from autopar.runtime.ray_backend.session import RaySession

__all__ = ["Ray", "RaySession"]


@dataclass(frozen=True)
class Ray:
    """A backend that runs every stage in a process of its own on a Ray cluster.

    A node offers its devices as a custom resource named after their kind: `ray start
    --resources='{"T4": 4}'`.

    Attributes:
        address: of a running cluster; None: the one this machine belongs to.
        emulate: make up the plan's nodes on this machine, with host devices, and stop them at the end.
        platform: "cpu" or "cuda"; None: "cpu" when emulating, else "cuda".
        host: the address workers listen on.
        timeout: seconds a stage waits for a message before it gives up.
    """

    address: str | None = None
    emulate: bool = False
    platform: str | None = None
    host: str = "127.0.0.1"
    timeout: float = 300.0

    def start(self, plan: Plan, program: Program, traced: Any) -> RaySession:
        """Returns a session, all segments compiled.

        Raises:
            BackendError: the cluster cannot be reached, lacks devices, or its workers don't start.
            NotImplementedError: a stage spans several nodes.
        """
        wide = [s for s, stage in enumerate(plan.stages) if len(stage.nodes) > 1]
        if wide:
            raise NotImplementedError(
                f"stage {wide[0]} spans the nodes {', '.join(plan.stages[wide[0]].nodes)}; the Ray backend runs a stage "
                "on one node: ask for more stages, or run the plan with InProcess()"
            )
        nodes = Nodes(plan, self.address, self.emulate)
        platform = self.platform or ("cpu" if self.emulate else "cuda")
        try:
            nodes.check(plan)
            return RaySession(plan, program, traced, nodes, platform, self.host, self.timeout)
        except BaseException:
            nodes.close()
            raise
