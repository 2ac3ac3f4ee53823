"""One cell of the plan benchmark: a model on a mesh, the automatic plan beside every expert's."""

from __future__ import annotations

import hashlib
import math
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import autopar
from autopar.api.tracing import Tracer
from autopar.bench.experts import Expert, experts
from autopar.bench.plan_cases import Case
from autopar.bench.programs import Programs
from autopar.bench.score import Score, predicted_wire, score
from autopar.core.errors import PlanError
from autopar.core.graph import Graph, Phase
from autopar.core.mesh import Mesh
from autopar.core.plan import Memory, ShardingPlan
from autopar.core.program import Segment
from autopar.runtime.layout import jax_mesh
from autopar.runtime.lower import Lowered, lower
from autopar.runtime.segments import Compiled
from autopar.sharding import plan as intra
from autopar.sharding.options import Options
from autopar.sharding.pins import Pins
from autopar.sharding.ways.grid import grid_of
from autopar.sharding.ways.resharding import divisible, fits
from autopar.stages.offers import replacements
from autopar.trace.traced import Traced

AS_WRITTEN, COMPLETED = "as written", "rest planned"
STRUCTURE = {
    "xla_disable_hlo_passes": "cpu-all-reduce-combiner,cse_barrier_expander,convolution-canonicalization",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_backend_optimization_level": 0,
} | ({"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {})
"""How programs are compiled to be read: collectives apart, the schedule that needs least memory, barriers
kept until that is made, convolutions as they are written (not transposed for kernels of CPUs), and machine
code in a hurry. Otherwise the instructions are those of a full compilation."""


@dataclass(frozen=True)
class Row:
    """One plan of a cell.

    Attributes:
        name: "automatic", or the expert's. variant: who chose what the expert's layouts leave open.
        score: of the compiled program.
        wire, peak, seconds: what the plan predicts; None where the partitioner chose.
        planning, compiling: seconds they took.
        step: measured seconds on host devices, or None.
    """

    name: str
    variant: str
    score: Score
    wire: dict[str, float] | None = None
    peak: int | None = None
    seconds: float | None = None
    planning: float = 0.0
    compiling: float = 0.0
    step: float | None = None
    status: str = ""


class Draft(NamedTuple):
    """A plan, and the seconds that making it took."""

    plan: ShardingPlan
    planning: float


@dataclass(frozen=True)
class Cell:
    """A model on a mesh.

    Attributes:
        failed: (expert, why it was not judged).
        plan: what the automatic plan's layouts hash to. version: of autopar, as `version_of_code` says it.
    """

    model: str
    mesh: str
    device: str
    automatic: Row
    experts: tuple[Row, ...]
    failed: tuple[tuple[str, str], ...]
    plan: str = ""
    version: str = ""

    @property
    def best(self) -> Row:
        """The best expert's; the automatic one where no expert was judged."""
        return min(self.experts, key=lambda row: row.score.seconds, default=self.automatic)

    @property
    def ratio(self) -> float:
        """Automatic over best expert, by the one measure."""
        return self.automatic.score.seconds / self.best.score.seconds


@dataclass
class Bench:
    """A traced model on a mesh, ready to be planned and compiled in several ways.

    near: an expert's plan is compiled only if it is predicted to take at most so many times as long as the
    best expert's; 0: no expert is judged. programs: those that are compiled already.
    """

    case: Case
    mesh: Mesh
    traced: Traced
    steps: int = 0
    near: float = math.inf
    seconds: float = 10.0
    gap: float = 1e-3
    programs: Programs = field(default_factory=Programs)
    rows: dict[str, Row] = field(default_factory=dict)

    @classmethod
    def of(cls, case: Case, mesh: Mesh, steps: int = 0, near: float = math.inf) -> Bench:
        traced = Tracer(case.step.step, case.step.args, {}, layer_scans=False)(1, False)
        return cls(case, mesh, traced, steps, near)

    def on(self, mesh: Mesh) -> Bench:
        """Returns the same trace on the same number of other devices; programs are shared."""
        return replace(self, mesh=mesh, rows={})

    @property
    def graph(self) -> Graph:
        return self.traced.graph

    def options(self, pins: Pins = ()) -> Options:
        types = replacements(self.mesh.device, self.graph)
        return Options(
            pinned=pins, gap=self.gap, seconds=self.seconds, dtypes=types.dtypes, products=types.products
        )

    def automatic(self) -> tuple[Row, ShardingPlan]:
        """Returns the row of the planner's own plan, and that."""
        draft = self.draft(())
        return self.planned("automatic", "", draft), draft.plan

    def draft(self, pins: Pins) -> Draft:
        """Returns the best plan with these layouts pinned. Raises PlanError."""
        start = time.perf_counter()
        found = intra.plan(self.graph, range(len(self.graph.equations)), self.mesh, self.options(pins))
        return Draft(found, time.perf_counter() - start)

    def planned(self, name: str, variant: str, draft: Draft) -> Row:
        """Returns the row of a plan."""
        found = draft.plan
        row = self.compiled(name, variant, found, draft.planning)
        wire, peak = predicted_wire(found), found.memory.peak
        return replace(row, wire=wire, peak=peak, seconds=found.objective, status=found.status)

    def written(self, expert: Expert) -> Row:
        """Returns the row of an expert's layouts, everything else chosen by the partitioner."""
        return self.compiled(expert.name, AS_WRITTEN, bare(self.graph, self.mesh, self.pins(expert)), 0.0)

    def pins(self, expert: Expert) -> Pins:
        """Returns what an expert prescribes."""
        return keepable(self.graph, self.mesh, expert.pins(self.graph, self.mesh, self.case))

    def judge(self, chosen: Sequence[Expert], failed: list[tuple[str, str]]) -> Iterator[Row]:
        """Yields the rows of experts, two for each; adds (name, why) to `failed` for what is not judged."""
        drafts: dict[Expert, Draft] = {}
        for expert in chosen:
            try:
                drafts[expert] = self.draft(self.pins(expert))
            except PlanError as error:
                failed.append((expert.name, str(error)))
        best = min((d.plan.objective for d in drafts.values()), default=math.inf)
        for expert in chosen:
            draft = drafts.get(expert)
            if draft is not None and draft.plan.objective > self.near * best:
                ratio = draft.plan.objective / best
                failed.append(
                    (expert.name, f"predicted to take {ratio:.2f} times as long as the best of them")
                )
                # what the partitioner does with rows of images is not predicted
                draft, wanted = None, bool(expert.rows)
            else:
                wanted = True
            if draft is not None:
                yield self.planned(expert.name, COMPLETED, draft)
            if wanted:
                yield self.written(expert)

    def compiled(self, name: str, variant: str, found: ShardingPlan, planning: float) -> Row:
        """Returns the row of a plan of this trace; plans with equal layouts share theirs."""
        said = fingerprint(found)
        if said not in self.rows:
            self.rows[said] = self._judged(found)
        return replace(self.rows[said], name=name, variant=variant, planning=planning)

    def _judged(self, found: ShardingPlan) -> Row:
        jmesh = jax_mesh(self.mesh, self._devices)
        lowered = lower(self.traced, step_segment(self.graph), found, jmesh, ordered=True)
        replaced = {i: o for o, i in self.graph.aliases}
        jitted = Compiled(lowered, tuple(sorted(replaced)), heirs(self.graph)).jitted
        ready = jitted.lower(*lowered.inputs)  # type: ignore[attr-defined]
        program = self.programs.compiled(ready, STRUCTURE)
        measured = timed(ready.compile(), lowered, self.steps) if self.steps else None
        judged = score(program.text, program.peak, self.mesh)
        return Row("", "", judged, compiling=program.compiling, step=measured)

    @property
    def _devices(self) -> list[Any]:
        return jax.devices()[: self.mesh.size]


def cell(bench: Bench, label: str) -> Cell:
    """Returns the comparison of a model's plans on a mesh, which is called `label`."""
    automatic, found = bench.automatic()
    failed: list[tuple[str, str]] = []
    rows = tuple(bench.judge(experts(bench.mesh, bench.case) if bench.near > 0 else (), failed))
    made = Cell(bench.case.name, label, bench.mesh.device.name, automatic, rows, tuple(failed))
    return replace(made, plan=fingerprint(found), version=version_of_code())


def fingerprint(found: ShardingPlan) -> str:
    """Returns a short name for what a plan compiles to: equal for plans of one step with equal layouts."""
    said = (found.mesh.shape, found.specs, found.uses, found.partials, found.loops)
    types = (found.dtypes, found.products, found.regather, *found.held)
    return hashlib.sha256(repr((said, types)).encode()).hexdigest()[:12]


def version_of_code() -> str:
    """Returns the commit that the package was checked out at, or its version where it is installed."""
    command = ["git", "-C", str(Path(autopar.__file__).parent), "describe", "--always", "--dirty"]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    return said.stdout.strip() if said.returncode == 0 else autopar.__version__


def heirs(graph: Graph) -> dict[int, int]:
    """Returns position of old state among the step's inputs → that of the new one among its outputs."""
    places = {v: k for k, v in enumerate(step_segment(graph).outputs)}
    news = ((i, graph.outputs[o]) for o, i in graph.aliases)
    return {i: places[v] for i, v in news if v is not None}


def step_segment(graph: Graph) -> Segment:
    """Returns the whole step as one program."""
    outputs = tuple(dict.fromkeys(v for v in graph.outputs if v is not None))
    every = tuple(range(len(graph.equations)))
    return Segment("step", 0, Phase.FORWARD, 0, every, (*graph.inputs, *graph.constants), outputs)


def bare(graph: Graph, mesh: Mesh, pins: Pins) -> ShardingPlan:
    """Returns a plan that says the pinned layouts and nothing else; new state lies as the old did."""
    specs = dict(pins)
    for output, position in graph.aliases:
        new, old = graph.outputs[output], graph.inputs[position]
        if new is not None and old in specs:
            specs[new] = specs[old]
    memory = Memory(0, 0, 1, 0, mesh.device.memory)
    return ShardingPlan(mesh, tuple(specs.items()), (), (), 0.0, 0.0, 0.0, memory, (), 0.0, 0.0, "written")


def keepable(graph: Graph, mesh: Mesh, pins: Pins) -> Pins:
    """Returns the pins whose axes divide their dims."""
    grid = grid_of(mesh)
    return tuple(
        (v, spec) for v, spec in pins if fits(grid.layout(spec), divisible(graph.values[v].shape, grid))
    )


def timed(program: Any, lowered: Lowered, steps: int) -> float:
    """Returns the median seconds of a call on host devices, donated arguments made anew each time."""
    times: list[float] = []
    for _ in range(steps + 1):
        arrays = [_zeros(x) for x in lowered.inputs]
        jax.block_until_ready(arrays)
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def _zeros(x: jax.ShapeDtypeStruct) -> Any:
    return jax.device_put(jnp.zeros(x.shape, x.dtype), x.sharding)
