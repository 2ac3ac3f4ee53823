"""The exact stage program over unlike devices: cut a chain of layers into stages and give each a submesh.

`solve_stages` minimises sum of stage times + transfers + (B - 1) * slowest stage + largest fixed cost (or
latency, or the slowest stage alone; `stage_dp_problem` states each) over all ways to cut the layers, to
choose a submesh for each stage, and to order kinds along the pipeline, within the devices there are of each
kind and the memory of each device at the stage's position. How:

1. *Arcs.* A stage that may be chosen is an arc; a plan is a path from layer 0 to layer L (`stage_dp_arcs`).
2. *Boxes.* Alpa (Zheng et al., OSDI 2022, Sec. 5.2) enumerates the slowest stage's time t and solves a
   dynamic program for each, skipping values closer than epsilon. We branch instead: a box is an interval of
   t (and one of the largest fixed cost f). Arcs above the interval are left out, the objective's terms are
   at least the interval's low ends, and a box whose bound reaches the best plan known is dropped whole.
   Boxes are taken best bound first, so at any moment the least bound among open boxes is a bound on the
   optimum. No epsilon.
3. *Prices.* In a box, device counts are first relaxed: priced, not counted (`stage_dp_prices`). That gives
   the box's bound, and for every layer, kind and position a bound on the cost of what may come before. Arcs
   whose cheapest priced plan reaches the best plan known are deleted.
4. *Labels.* Then the dynamic program counts exactly (`stage_dp_kernels.label_pass`): from the last layer to
   the first, a label is (layer, kind, position, devices used per kind) with its cost; labels that can't beat
   the best plan known, or that another label dominates, are dropped (resource-constrained shortest paths;
   Irnich & Desaulniers, "Shortest path problems with resource constraints", 2005). Device counts need no
   grid and no common divisor: only those reached are stored. A first pass keeps few labels per layer (a
   beam), which finds good plans; if nothing was cut off the box is solved, otherwise it is split in two, or,
   when it is a single value of t and f, searched more widely.
5. If nothing fits, the least missing memory is found by bisection over feasibility problems
   (`stage_dp_missing`).

Round-off: costs are float64 sums of at most 2L + 2 terms. Every priced bound is lowered by 1e-12 of the
priced devices, a plan must be better by half of `TOLERANCE` (relative) to be of interest, and the bound
returned for an optimal plan is `objective * (1 - TOLERANCE)`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

from autopar_solver.stage_dp_missing import MissingMemory, missing_memory
from autopar_solver.stage_dp_problem import (
    Latency,
    Objective,
    StagePlan,
    StageProblem,
    StageProblemError,
    Stages,
    SubmeshChoice,
    Throughput,
    TrainStep,
    gpipe,
    inference,
    one_f_one_b,
    price,
)
from autopar_solver.stage_dp_search import TOLERANCE, Progress, Search

__all__ = [
    "Latency",
    "MissingMemory",
    "Objective",
    "StagePlan",
    "StageProblem",
    "StageProblemError",
    "StageSolution",
    "Stages",
    "SubmeshChoice",
    "Throughput",
    "TrainStep",
    "gpipe",
    "inference",
    "one_f_one_b",
    "price",
    "solve_stages",
]

MISSING_SECONDS = 60.0  # for finding how much memory is missing, when no time limit was given

Status = Literal["optimal", "feasible", "infeasible", "unknown"]


@dataclass(frozen=True)
class StageSolution:
    """The best plan found and how far from the optimum it can be.

    Attributes:
        stages: (start, stop, choice) per stage in pipeline order; empty if there is no plan.
        objective: its cost in seconds (`price`); inf if there is no plan.
        bound: no plan costs less. gap: (objective - bound) / objective, 0 where optimal.
        slowest: seconds of the slowest stage.
        runner_ups: other plans met in the search that use another mix of choices, best first; each is
            feasible and priced exactly, but a better runner-up may not have been met.
        seconds: wall-clock time taken.
        status: "optimal" (gap at most the one asked for, by default `TOLERANCE`), "feasible" (time was up),
            "infeasible" (proven; see `missing`) or "unknown" (time was up before any plan was found).
        missing: what memory is missing, where that is why there is no plan.
    """

    stages: Stages
    objective: float
    bound: float
    gap: float
    slowest: float
    runner_ups: tuple[StagePlan, ...]
    seconds: float
    status: Status
    missing: MissingMemory | None = None


def solve_stages(
    problem: StageProblem,
    *,
    runner_ups: int = 3,
    seconds: float | None = None,
    gap: float = TOLERANCE,
    progress: Progress | None = None,
    explain: bool = True,
) -> StageSolution:
    """The best plan of a stage problem, with a proof of how good it is.

    Args:
        problem: the stage problem.
        runner_ups: how many other plans to return at most.
        seconds: wall-clock limit; the best plan so far is returned then (and on KeyboardInterrupt). None: no
            limit.
        gap: stop once (objective - bound) / objective is at most this.
        progress: called now and then with (objective, bound, gap, seconds since the start).
        explain: find out how much memory is missing where nothing fits.
    Raises:
        StageProblemError: `seconds` or `runner_ups` or `gap` is out of range.
    """
    if seconds is not None and not seconds > 0:
        raise StageProblemError(f"seconds must be above 0, got {seconds}; leave it out for no limit")
    if runner_ups < 0 or not gap >= 0:
        raise StageProblemError(f"runner_ups and gap must be >= 0, got {runner_ups} and {gap}")
    search = Search(problem, seconds, max(gap, TOLERANCE), progress)
    try:
        search.run()
        if runner_ups:
            search.look_around()
    except KeyboardInterrupt:
        search.interrupted = True
    solution = _solution(search, runner_ups)
    if solution.status != "infeasible" or not explain:
        return solution
    left = MISSING_SECONDS if seconds is None else max(0.5, seconds - solution.seconds)
    try:
        missing = missing_memory(problem, left)
    except KeyboardInterrupt:
        missing = None
    return replace(solution, missing=missing, seconds=time.perf_counter() - search.began)


def _solution(search: Search, runner_ups: int) -> StageSolution:
    """What a search found."""
    took = time.perf_counter() - search.began
    bound, best = search.bound(), search.best
    if best is None:
        status: Status = "infeasible" if search.proven and math.isinf(search.lost) else "unknown"
        bound = math.inf if status == "infeasible" else bound
        return StageSolution((), math.inf, bound, math.inf, math.inf, (), took, status)
    gap = max(0.0, (best.objective - bound) / best.objective) if best.objective else 0.0
    status = "optimal" if gap <= search.goal * (1 + 1e-3) else "feasible"
    others = _unlike(sorted(search.plans.values(), key=lambda plan: plan.objective), runner_ups)
    return StageSolution(best.stages, best.objective, bound, gap, best.slowest, others, took, status)


def _unlike(plans: list[StagePlan], count: int) -> tuple[StagePlan, ...]:
    """The best plan of each further mix of choices (which choices, how often), the first mix left out."""
    seen: set[tuple[int, ...]] = set()
    out: list[StagePlan] = []
    for plan in plans:
        mix = tuple(sorted(choice for _, _, choice in plan.stages))
        if mix not in seen:
            seen.add(mix)
            out.append(plan)
        if len(out) > count:
            break
    return tuple(out[1:])
