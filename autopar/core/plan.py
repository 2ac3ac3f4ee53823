"""Plans: how one region of the graph is sharded on one mesh, and how a step is spread over a cluster."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from autopar.core.graph import Alternative, Combine, Phase, Value
from autopar.core.mesh import Mesh
from autopar.core.program import Segment
from autopar.core.spec import Spec

VERSION = 2


TIGHT = 0.7
"""A plan that takes less of a device is not short of memory."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device.

    Attributes:
        state: parameters, optimizer state, constants, gradient sums: there for the whole step.
        activations: kept between a micro-batch's forward and backward, for one micro-batch.
        in_flight: how many micro-batches are kept at once.
        workspace: the most that is alive beside them at any moment.
        limit: what the device has.
    """

    state: int
    activations: int
    in_flight: int
    workspace: int
    limit: int

    @property
    def peak(self) -> int:
        return self.state + self.activations * self.in_flight + self.workspace

    @property
    def tight(self) -> bool:
        """Whether so much of the device is taken that it matters when memory is freed."""
        return self.peak > TIGHT * self.limit


@dataclass(frozen=True, slots=True)
class Collective:
    """Communication the compiled program will do.

    nbytes: what one device puts on the wire each time. seconds: each time. count: times per step.
    """

    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all, permute
    axes: tuple[str, ...]
    nbytes: int
    seconds: float
    count: int
    value: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class LoopLayouts:
    """Layouts inside the body of one loop equation; value ids and equation indices are the body's own.

    A body input is in its layout of `specs` when the body starts (for a carry also the layout in which
    every trip leaves it, and of the loop's result); a stacked result leaves the body in the layout of the
    loop's result without its first dim.

    Attributes:
        equation: index of the loop equation in the graph (or body) around it.
        specs, uses, partials: as in `ShardingPlan`.
        loops: of loops inside the body.
    """

    equation: int
    specs: tuple[tuple[int, Spec], ...]
    uses: tuple[tuple[int, int, Spec], ...]
    partials: tuple[tuple[int, int, Spec], ...]
    loops: tuple[LoopLayouts, ...] = ()


@dataclass(frozen=True)
class ShardingPlan:
    """How a region (the equations of one stage) is sharded on one mesh.

    Attributes:
        mesh: the devices.
        specs: (value id, layout in which it is kept) for every tensor of the region with at least one dim.
        uses: (equation index, operand position, layout it is read in) where that differs from `specs`.
        partials: (equation index, result position, layout right after the equation, before it is moved on to
            that of `specs`) where the two differ.
        forward, backward: seconds per micro-batch. apply: seconds per step.
        memory: bytes on one device.
        collectives: all predicted communication.
        objective, bound: seconds per step: what the choice costs in the model, and what no choice is below.
        status: "optimal" or "feasible".
        notes: equations without a rule, layouts given up, …, each for people.
        dtypes: (from, to): element types this stage keeps in another type, because its devices lack them.
        products: (from, to): the type in which their matrix products run (operands scaled per tensor).
        regather: state that forward and backward read in another layout is moved for each of them, not kept.
        held: (value that the backward computes again, the equal one of the forward, a layout): the second is
            kept in this layout for the readers of the first that want another than its own.
    """

    mesh: Mesh
    specs: tuple[tuple[int, Spec], ...]
    uses: tuple[tuple[int, int, Spec], ...]
    partials: tuple[tuple[int, int, Spec], ...]
    forward: float
    backward: float
    apply: float
    memory: Memory
    collectives: tuple[Collective, ...]
    objective: float
    bound: float
    status: str
    notes: tuple[str, ...] = ()
    dtypes: tuple[tuple[str, str], ...] = ()
    products: tuple[tuple[str, str], ...] = ()
    loops: tuple[LoopLayouts, ...] = ()
    regather: bool = False
    held: tuple[tuple[int, int, Spec], ...] = ()

    @cached_property
    def layout(self) -> dict[int, Spec]:
        """Value id → layout."""
        return dict(self.specs)

    @cached_property
    def reads(self) -> dict[tuple[int, int], Spec]:
        """(Equation index, operand position) → layout it is read in, where that differs from `layout`."""
        return {(e, k): spec for e, k, spec in self.uses}

    @cached_property
    def made(self) -> dict[tuple[int, int], Spec]:
        """(Equation index, result position) → layout right after it, where that differs from `layout`."""
        return {(e, k): spec for e, k, spec in self.partials}

    @property
    def gap(self) -> float:
        """Proven relative distance of the objective from the optimum, 0 when optimal."""
        return max(0.0, 1 - self.bound / self.objective) if self.objective > 0 else 0.0

    def dtype(self, name: str) -> str:
        """Returns the element type this stage uses for `name`."""
        return dict(self.dtypes).get(name, name)


@dataclass(frozen=True)
class Stage:
    """A run of layers on a submesh.

    Attributes:
        start, stop: layers [start, stop).
        devices: (node name, index in the node) per device, in mesh order (row-major).
        sharding: the intra-operator plan of the stage's equations.
    """

    start: int
    stop: int
    devices: tuple[tuple[str, int], ...]
    sharding: ShardingPlan

    @property
    def mesh(self) -> Mesh:
        return self.sharding.mesh

    @property
    def memory(self) -> Memory:
        return self.sharding.memory

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes the stage spans."""
        return tuple(dict.fromkeys(node for node, _ in self.devices))


@dataclass(frozen=True, slots=True)
class Link:
    """What a transfer between two stages costs: seconds = latency + bytes / bandwidth."""

    source: int
    to: int
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Plan:
    """How a step is spread over a cluster; enough, without the model, to emit and simulate its program.

    Attributes:
        model: fingerprint of the graph the plan was made for.
        layers: names of the layers.
        stages: in pipeline order.
        links: one for every ordered pair of stages that exchange data.
        microbatches: per step. schedule: "1f1b" or "gpipe".
        segments: what each stage runs.
        values: (id, value) of every tensor that is an input or output of a segment.
        inputs, outputs, aliases, batch, constants, combine: as in the graph.
        objective, bound: seconds per step in the stage program's model, and its proven lower bound.
        step_time, bubble: seconds and share of idle time in the simulated program.
        remat: (layer, what its backward pass computes again) for every layer that computes something again.
        layer_scans: whether scans over layers were cut into layers.
        notes: for people.
    """

    model: str
    layers: tuple[str, ...]
    stages: tuple[Stage, ...]
    links: tuple[Link, ...]
    microbatches: int
    schedule: str
    segments: tuple[Segment, ...]
    values: tuple[tuple[int, Value], ...]
    inputs: tuple[int, ...]
    outputs: tuple[int | None, ...]
    aliases: tuple[tuple[int, int], ...]
    batch: tuple[int, ...]
    constants: tuple[int, ...]
    combine: tuple[tuple[int, Combine], ...]
    objective: float
    bound: float
    step_time: float = 0.0
    bubble: float = 0.0
    notes: tuple[str, ...] = ()
    cluster: str = ""
    remat: tuple[Alternative, ...] = ()
    layer_scans: bool = True
    version: int = VERSION

    @cached_property
    def value(self) -> dict[int, Value]:
        return dict(self.values)

    @property
    def gap(self) -> float:
        """Proven relative distance from the optimum: the worst of the stage program's and the stages' own."""
        own = max(0.0, 1 - self.bound / self.objective) if self.objective > 0 else 0.0
        return max([own, *(stage.sharding.gap for stage in self.stages)])

    @property
    def devices(self) -> int:
        return sum(stage.mesh.size for stage in self.stages)

    def link(self, source: int, to: int) -> Link:
        return next(link for link in self.links if (link.source, link.to) == (source, to))

    def with_timing(self, step_time: float, bubble: float) -> Plan:
        return replace(self, step_time=step_time, bubble=bubble)
