"""A plan for a whole step: layers into stages, stages onto unlike devices, each stage sharded exactly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from autopar.cluster import Cluster, place, submeshes
from autopar.core.errors import BadInput, ClusterError, DoesNotFit, PlanError
from autopar.core.graph import Graph
from autopar.core.mesh import Mesh
from autopar.core.plan import Plan, ShardingPlan, Stage
from autopar.sharding.text import gigabytes
from autopar.stages.assemble import assemble
from autopar.stages.cut import cut
from autopar.stages.offers import Options, Price, Shard
from autopar.stages.problem import Program, build, in_flight
from autopar_solver.stage_dp import MissingMemory, StagePlan, StageSolution, solve_stages
from autopar_solver.stage_dp import price as price_stages

Runs = tuple[tuple[int, int, int], ...]
"""(start, stop, choice) per stage, in layers of the graph."""

DEFAULT = Options()


def plan(graph: Graph, cluster: Cluster, price: Price, shard: Shard, options: Options = DEFAULT) -> Plan:
    """Returns the fastest plan found that fits: stages, their devices and shardings, segments and links.

    The stage program chooses runs of layers, a submesh for each and one of its offers, by the sum of the
    layers' prices; then every stage is sharded exactly. A stage whose exact plan does not fit is forbidden
    and the stage program solved again.

    `objective` and `bound` of the result are seconds per step in that program. What is proven: no
    assignment of runs of layers to submeshes that fits costs less than `bound`, where a run costs what its
    layers' offers add up to (the same rank of offer for all layers of a run) and begins where the notes say,
    if they do. How far each stage's sharding is from its own optimum is in `stages[i].sharding`.

    Args:
        graph: completed by `assign`; `microbatches` is set and shapes are those of one micro-batch.
        cluster: the devices there are.
        price: offers per layer and mesh.
        shard: the exact plan of a stage.
        options: schedule, limits.

    Raises:
        BadInput: more stages asked for than there are layers or devices.
        DoesNotFit: no plan keeps every device within its memory; says how much is missing.
        PlanError: no plan at all, for another reason (no offer is finite; the cut is impossible).
        ClusterError: the chosen submeshes cannot be packed into the nodes.
    """
    _check(graph, cluster, options)
    choices = submeshes(cluster) if options.choices is None else options.choices
    program = build(graph, cluster, choices, price, options)
    return _Planner(graph, cluster, shard, options).run(program)


def _check(graph: Graph, cluster: Cluster, options: Options) -> None:
    layers = max(1, len(graph.layers))
    if options.least > layers:
        raise BadInput(
            f"{options.least} stages asked for, but the model has {layers} layer{'s' * (layers > 1)}; "
            "ask for fewer, or mark more layers (autopar.layer_boundary())"
        )
    if options.least > cluster.size:
        raise BadInput(f"{options.least} stages asked for, but there are {cluster.size} devices: {cluster}")


class _DoesNotFit(Exception):
    """A stage whose exact plan does not fit."""

    def __init__(self, run: tuple[int, int, int], in_flight: int, cause: DoesNotFit):
        super().__init__(str(cause))
        self.run, self.in_flight, self.cause = run, in_flight, cause


class _Unplaceable(Exception):
    """Submeshes that cannot be packed into the nodes together; `choice` is the largest of them."""

    def __init__(self, choice: int, cause: ClusterError):
        super().__init__(str(cause))
        self.choice, self.cause = choice, cause


@dataclass
class _Planner:
    graph: Graph
    cluster: Cluster
    shard: Shard
    options: Options
    known: dict[tuple[tuple[int, ...], Mesh, int], ShardingPlan] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def run(self, program: Program) -> Plan:
        last: _DoesNotFit | _Unplaceable | None = None
        if left_out := sorted(set(range(program.layers)) - set(program.cuts)):
            text = ", ".join(map(str, left_out))
            self._note(f"to keep the stage program small, no stage begins at layer {text}")
        for _ in range(self.options.rounds):
            solution = self._solve(program)
            if not solution.stages:
                return self._tight(program, solution, last)
            try:
                return self._realise(program, solution)
            except _DoesNotFit as error:
                start, stop, choice = error.run
                self._note(f"layers {start}–{stop - 1} on {program.choices[choice].mesh} do not fit: {error}")
                program, last = program.forbid(*error.run, error.in_flight), error
            except _Unplaceable as error:
                self._note(f"{error}; planned without {program.choices[error.choice].mesh}")
                program, last = program.forbid_choice(error.choice), error
        assert last is not None
        raise self._given_up(last)

    def _note(self, text: str) -> None:
        self.notes.append(text)

    def _solve(self, program: Program) -> StageSolution:
        options = self.options
        return solve_stages(program.problem, runner_ups=3, seconds=options.seconds, gap=options.gap)

    def _realise(self, program: Program, solution: StageSolution) -> Plan:
        """Returns the plan of the best assignment that can be packed into the nodes."""
        best = StagePlan(solution.stages, solution.objective, solution.slowest, 0.0, 0)
        failed: _Unplaceable | None = None
        for found in (best, *solution.runner_ups):
            runs = program.stages(found.stages)
            try:
                devices = self._place(program, runs)
            except _Unplaceable as error:
                failed = failed or error
                continue
            return self._finish(program, runs, devices, found.objective, solution.bound)
        assert failed is not None
        raise failed

    def _place(self, program: Program, runs: Runs) -> tuple[tuple[tuple[str, int], ...], ...]:
        chosen = [program.choices[c] for _, _, c in runs]
        try:
            return place(self.cluster, chosen)
        except ClusterError as error:
            largest = max((c for _, _, c in runs), key=lambda c: program.choices[c].devices)
            raise _Unplaceable(largest, error) from error

    def _finish(
        self,
        program: Program,
        runs: Runs,
        devices: tuple[tuple[tuple[str, int], ...], ...],
        objective: float,
        bound: float,
    ) -> Plan:
        """Returns the plan: the cut of these runs, every stage sharded."""
        layers = len(self.graph.layers)
        segments = cut(self.graph, tuple(s for s, (i, j, _) in enumerate(runs) for _ in range(i, j))[:layers])
        flights = in_flight(self.graph, self.options.schedule)
        stages: list[Stage] = []
        for s, (run, where) in enumerate(zip(runs, devices)):
            own = tuple(sorted({i for segment in segments if segment.stage == s for i in segment.equations}))
            # a single stage runs forward and backward of a micro-batch as one function
            flight = flights[min(len(runs) - s, len(flights)) - 1] if len(runs) > 1 else 1
            sharding = self._shard(own, program, run, flight)
            stages.append(Stage(run[0], run[1], where, sharding))
        return assemble(
            self.graph,
            self.cluster,
            tuple(stages),
            segments,
            self.options,
            objective,
            bound,
            tuple(self.notes),
        )

    def _shard(
        self, equations: tuple[int, ...], program: Program, run: tuple[int, int, int], flight: int
    ) -> ShardingPlan:
        key = (equations, program.choices[run[2]].mesh, flight)
        if key not in self.known:
            try:
                self.known[key] = self.shard(*key)
            except DoesNotFit as error:
                raise _DoesNotFit(run, flight, error) from error
        return self.known[key]

    # -- when the stage program has no plan --------------------------------------------------

    def _tight(
        self, program: Program, solution: StageSolution, last: _DoesNotFit | _Unplaceable | None
    ) -> Plan:
        """Tries the assignment that misses least by its layers' prices: exact plans may be leaner."""
        if last is not None:
            raise self._given_up(last)
        missing = solution.missing or self._missing(program)
        if missing is None:
            raise PlanError(
                f"no plan exists for {program.layers} layers on {self.cluster}: no allowed number of stages "
                "with finite prices covers the layers; allow more stages or other devices"
            )
        runs = program.stages(missing.stages)
        self._note("by its layers' prices no plan fits; this is the one that misses least, sharded exactly")
        try:
            devices = self._place(program, runs)
            cost = price_stages(program.problem, missing.stages).objective
            return self._finish(program, runs, devices, cost, self._unlimited(program).bound)
        except (_DoesNotFit, _Unplaceable):
            start, stop, choice = runs[missing.stage]
            raise DoesNotFit(
                f"no plan keeps every device of {self.cluster} within its memory: at best, each device of "
                f"stage {missing.stage} (layers {start}–{stop - 1} on {program.choices[choice].mesh}) "
                f"misses {_size(missing.bytes)}; add devices, use more micro-batches or rematerialisation",
                int(missing.bytes),
            ) from None

    def _missing(self, program: Program) -> MissingMemory | None:
        """Returns what the fastest assignment without memory limits misses, if there is one."""
        solution = self._unlimited(program)
        if not solution.stages:
            return None
        priced = price_stages(program.problem, solution.stages)
        return MissingMemory(priced.shortfall, solution.stages, priced.tight, False)

    def _unlimited(self, program: Program) -> StageSolution:
        """Returns the best assignment if memory did not matter; its bound holds whatever memory there is."""
        unlimited = replace(program.problem, limit=np.full(len(program.choices), np.inf))
        return self._solve(replace(program, problem=unlimited))

    def _given_up(self, last: _DoesNotFit | _Unplaceable) -> Exception:
        if isinstance(last, _Unplaceable):
            return last.cause
        start, stop, _ = last.run
        missing = last.cause.missing
        return DoesNotFit(
            f"no plan keeps every device of {self.cluster} within its memory; the last one tried failed for "
            f"layers {start}–{stop - 1}: {last.cause}; add devices, use more micro-batches or "
            "rematerialisation",
            missing,
        )


def _size(nbytes: float) -> str:
    return gigabytes(nbytes) if math.isfinite(nbytes) else "an unbounded amount"
