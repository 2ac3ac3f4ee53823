"""How a step may be spread: each method is a frozen dataclass that `parallelize` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from autopar.core.errors import BadInput

if TYPE_CHECKING:
    from autopar.core.plan import Plan


def _at_least_one(what: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise BadInput(f"{what} must be a whole number of at least 1, got {value!r}")


@dataclass(frozen=True)
class Auto:
    """Everything chosen: stages and their devices by the stage program, shardings by the ILP.

    Attributes:
        micro_batches: per step; None tries powers of two and keeps the fastest plan that fits.
        schedule: "1f1b" or "gpipe".
        stages: exactly so many pipeline stages; None: as many as is best.
        remat: recompute each layer's activations in its backward pass; None: only if nothing fits otherwise.
        layers: how many layers to cluster a model into that does not name its own.
        whole_nodes: every stage takes whole nodes, so that a worker never shares its machine.
    """

    micro_batches: int | None = None
    schedule: str = "1f1b"
    stages: int | None = None
    remat: bool | None = None
    layers: int | None = None
    whole_nodes: bool = False

    def __post_init__(self) -> None:
        _at_least_one("micro_batches", self.micro_batches)
        _at_least_one("stages", self.stages)
        _at_least_one("layers", self.layers)


@dataclass(frozen=True)
class Pipeline(Auto):
    """Auto with at least two stages."""


@dataclass(frozen=True)
class ShardParallel:
    """One stage on all devices of one kind, sharded by the ILP.

    Attributes:
        mesh: shape of the logical mesh, e.g. (2, 4); None tries the shapes that the devices allow.
        micro_batches: per step.
        remat: as in Auto.
    """

    mesh: tuple[int, ...] | None = None
    micro_batches: int = 1
    remat: bool = False

    def __post_init__(self) -> None:
        _at_least_one("micro_batches", self.micro_batches)
        for size in self.mesh or ():
            _at_least_one("a mesh axis", size)


@dataclass(frozen=True)
class DataParallel(ShardParallel):
    """The batch is sharded over all devices, the state is replicated."""


@dataclass(frozen=True)
class Zero2(ShardParallel):
    """Data parallel with gradients and optimizer state sharded (Rajbhandari et al. 2020, ZeRO stage 2)."""


@dataclass(frozen=True)
class Zero3(ShardParallel):
    """Data parallel with parameters, gradients and optimizer state sharded (ZeRO stage 3, FSDP)."""


@dataclass(frozen=True)
class Manual:
    """A plan made earlier, maybe edited: `Manual(Plan.load("plan.json"))`."""

    plan: Plan


Method: TypeAlias = Auto | ShardParallel | Manual
