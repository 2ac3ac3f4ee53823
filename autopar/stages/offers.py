"""What `plan` is given and asked: the price of a layer on a mesh, the exact plan of a stage, and options."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from autopar.cluster import MeshChoice
from autopar.core.errors import BadInput, UnknownName
from autopar.core.graph import Graph
from autopar.core.mesh import Device, Mesh
from autopar.core.plan import ShardingPlan

SCHEDULES = ("1f1b", "gpipe")


@dataclass(frozen=True, slots=True)
class Offer:
    """One way to shard a layer on a mesh: seconds, and bytes on one device. Infinite where impossible.

    Attributes:
        forward, backward: seconds per micro-batch. apply: seconds per step.
        state: bytes that are there for the whole step. activations: bytes kept per micro-batch in flight.
        workspace: the most bytes alive beside these at any moment.
    """

    forward: float
    backward: float
    apply: float
    state: float
    activations: float
    workspace: float


Price: TypeAlias = Callable[[int, Mesh], tuple[Offer, ...]]
"""(layer, mesh) → offers from the fastest to the leanest; a graph without layers is priced as layer 0."""

Shard: TypeAlias = Callable[[tuple[int, ...], Mesh, int], ShardingPlan]
"""(equations, mesh, micro-batches in flight) → the exact plan of a stage; raises DoesNotFit."""


@dataclass(frozen=True)
class Options:
    """What kind of plan is wanted.

    Attributes:
        schedule: "1f1b" or "gpipe".
        stages: exactly so many; overrides the two limits that follow.
        min_stages, max_stages: limits; None: as many as there are layers.
        max_layers: at most so many layers in one stage.
        slowest: seconds that no stage may exceed for a micro-batch, by its layers' prices.
        choices: the submeshes that may be used; None: all of the cluster's.
        rounds: how often the stage program is solved again because a stage's exact plan did not fit.
        gap: relative distance from the optimum at which the stage program may stop.
        seconds: time each solve of the stage program may take.
        model: fingerprint of the graph, kept in the plan.
    """

    schedule: str = "1f1b"
    stages: int | None = None
    min_stages: int = 1
    max_stages: int | None = None
    max_layers: int | None = None
    slowest: float = math.inf
    choices: tuple[MeshChoice, ...] | None = None
    rounds: int = 8
    gap: float = 1e-6
    seconds: float | None = 60.0
    model: str = ""

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise UnknownName("schedule", self.schedule, SCHEDULES)
        for name in ("stages", "min_stages", "max_stages", "max_layers", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadInput(f"{name} must be a whole number of at least 1, got {value}")
        if self.least > (self.most or self.least):
            raise BadInput(f"expected min_stages <= max_stages, got {self.min_stages} and {self.max_stages}")

    @property
    def least(self) -> int:
        return self.stages or self.min_stages

    @property
    def most(self) -> int | None:
        return self.stages or self.max_stages


class Replacements(NamedTuple):
    """Element types that a stage uses in place of the graph's (`ShardingPlan.dtypes`, `.products`)."""

    dtypes: tuple[tuple[str, str], ...] = ()
    products: tuple[tuple[str, str], ...] = ()


def replacements(device: Device, graph: Graph) -> Replacements:
    """Returns the 16-bit float types of the graph that the device lacks, and what it uses for them.

    They are kept as float32. Their matrix products run in float16 where the device has it (a V100 or T4 lacks
    bfloat16 but multiplies float16 fast; operands are scaled per tensor), else in float32.
    """
    used = {value.dtype for value in graph.values}
    for equation in graph.equations:
        if equation.loop is not None:
            used |= {value.dtype for value in equation.loop.body.values}
    lacking = [t for t in ("bfloat16", "float16") if t in used and not device.supports(t)]
    products = tuple((t, "float16") for t in lacking if t != "float16" and device.supports("float16"))
    return Replacements(tuple((t, "float32") for t in lacking), products)
