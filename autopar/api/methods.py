"""How a step may be spread: each method is a frozen dataclass that `parallelize` takes."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from autopar.core.errors import BadInput, UnknownName
from autopar.core.graph import Remat

if TYPE_CHECKING:
    from autopar.api.parallelize import Parallelized
    from autopar.core.plan import Plan


def _at_least_one(what: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise BadInput(f"{what} must be a whole number of at least 1, got {value!r}")


RematOption: TypeAlias = "bool | str | Mapping[str, str] | None"
"""What backward passes compute again. True or "full": all but what layers read of each other; "parts":
the same, but what passes between a layer's parts is kept (a block's attention and its feed-forward layer), so
that each part is computed again by itself; "products": what matrix products and convolutions made is kept;
False or "none": nothing. {layer: one of these words} for some layers, by name or pattern ("Block_*"). None:
chosen per layer where memory is short."""


def _check_remat(value: object) -> None:
    words = list(value.values()) if isinstance(value, Mapping) else [value]
    known = [r.value for r in Remat]
    for word in words:
        if isinstance(word, str):
            if word not in known:
                raise UnknownName("kind of remat", word, known)
        elif isinstance(value, Mapping) or not isinstance(word, bool | None):
            raise BadInput(
                f"remat takes True, False, one of {', '.join(known)}, or layer → word, got {word!r}"
            )


def remat_of(option: Any) -> Any:
    """Returns a method's `remat` as the tracer takes it; None where it is to be chosen."""
    if isinstance(option, Mapping):
        return {layer: Remat(word) for layer, word in option.items()}
    return Remat(option) if isinstance(option, str) else option


@dataclass(frozen=True)
class Auto:
    """Everything chosen: stages and their devices by the stage program, shardings by the ILP.

    Attributes:
        micro_batches: per step; None tries divisors of the batch and keeps the fastest plan that fits.
        schedule: "1f1b" or "gpipe".
        stages: exactly so many pipeline stages; None: as many as is best.
        remat: see `RematOption`; None: everything, if nothing fits otherwise or devices wait
            because memory is short.
        layers: how many layers to cluster a model into that does not name its own.
        whole_nodes: every stage takes whole nodes, so that a worker never shares its machine.
    """

    micro_batches: int | None = None
    schedule: str = "1f1b"
    stages: int | None = None
    remat: RematOption = None
    layers: int | None = None
    whole_nodes: bool = False

    def __post_init__(self) -> None:
        _at_least_one("micro_batches", self.micro_batches)
        _at_least_one("stages", self.stages)
        _check_remat(self.remat)
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
        remat: see `RematOption`.
    """

    mesh: tuple[int, ...] | None = None
    micro_batches: int = 1
    remat: RematOption = None

    def __post_init__(self) -> None:
        _at_least_one("micro_batches", self.micro_batches)
        _check_remat(self.remat)
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
    """A plan made earlier, maybe edited (`Manual(Plan.load("plan.json"))`), or layouts of some tensors.

    `Manual(specs={"params/*/up/kernel": P(None, "model")}, mesh={"data": 2, "model": 4})` keeps these tensors
    as said, on one stage; everything else is planned around them.

    Attributes:
        plan: the whole plan.
        specs: path of an argument, or name of an intermediate (`jax.ad_checkpoint.checkpoint_name`), → its
            PartitionSpec. `*` stands for any one part of a path, a path may leave out its beginning, and it
            may mean several tensors. State keeps its layout from step to step.
        mesh: shape of the logical mesh, or axis name → size; None tries the shapes that the devices allow.
        micro_batches, remat: as in ShardParallel.
    """

    plan: Plan | None = None
    specs: Mapping[str, Any] | None = None
    mesh: tuple[int, ...] | Mapping[str, int] | None = None
    micro_batches: int = 1
    remat: RematOption = None
    where: str = field(default="", init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", user_line())
        if (self.plan is None) == (self.specs is None):
            raise BadInput("Manual takes a plan, or specs=… (path → PartitionSpec), and not both")
        if self.specs is not None and not isinstance(self.specs, Mapping):
            raise BadInput(f"specs must be a dict of path → PartitionSpec, got {type(self.specs).__name__}")
        _at_least_one("micro_batches", self.micro_batches)
        _check_remat(self.remat)
        for size in self.mesh.values() if isinstance(self.mesh, Mapping) else self.mesh or ():
            _at_least_one("a mesh axis", size)


@dataclass(frozen=True)
class Follow:
    """The placements of another step, planned before: an evaluation step follows its train step.

    Arguments that the other step has too (by the end of their path, and shape) lie as they do there, so that
    nothing is moved between the two; everything else is planned around them.

    Attributes:
        step: what `parallelize` returned for the other step.
    """

    step: Parallelized

    def __post_init__(self) -> None:
        _parallelized(self.step, "Follow")


@dataclass(frozen=True)
class CreateState:
    """Makes the state of another step, planned before, directly as that step keeps it.

    For a function such as `init(key) -> state`: every device computes its own part of each array, and none
    ever holds the state whole.

    Attributes:
        step: what `parallelize` returned for the step that takes the state.
    """

    step: Parallelized

    def __post_init__(self) -> None:
        _parallelized(self.step, "CreateState")


def _parallelized(step: object, method: str) -> None:
    if not hasattr(step, "made"):
        raise BadInput(f"{method} takes what autopar.parallelize returned, got {type(step).__name__}")


def user_line() -> str:
    """Returns "file.py:41" of the nearest caller outside of this package, "" if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_PACKAGE) and not file.startswith("<"):
            return f"{os.path.basename(file)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep

Method: TypeAlias = Auto | ShardParallel | Manual | Follow | CreateState
