"""The exact stage program over unlike devices: cut a chain of layers into stages and give each a submesh.

`solve_stages` minimises sum of stage times + transfers + (B - 1) * slowest stage + largest fixed cost (or latency, or
the slowest stage alone; `stage_dp_problem` states each) over all ways to cut the layers, to choose a submesh for each
stage, and to order kinds along the pipeline, within the devices there are of each kind and the memory of each device
at the stage's position. How:

1. *Arcs.* A stage that may be chosen is an arc; a plan is a path from layer 0 to layer L (`stage_dp_arcs`).
2. *Boxes.* Alpa (Zheng et al., OSDI 2022, Sec. 5.2) enumerates the slowest stage's time t and solves a dynamic program
   for each, skipping values closer than epsilon. We branch instead: a box is an interval of t (and one of the largest
   fixed cost f). Arcs above the interval are left out, the objective's terms are at least the interval's low ends, and
   a box whose bound reaches the best plan known is dropped whole. Boxes are taken best bound first, so at any moment
   the least bound among open boxes is a bound on the optimum. No epsilon.
3. *Prices.* In a box, device counts are first relaxed: priced, not counted (`stage_dp_prices`). That gives the box's
   bound, and for every layer, kind and position a bound on the cost of what may come before. Arcs whose cheapest
   priced plan reaches the best plan known are deleted.
4. *Labels.* Then the dynamic program counts exactly (`stage_dp_kernels.label_pass`): from the last layer to the first,
   a label is (layer, kind, position, devices used per kind) with its cost; labels that can't beat the best plan known,
   or that another label dominates, are dropped (resource-constrained shortest paths; Irnich & Desaulniers, "Shortest
   path problems with resource constraints", 2005). Device counts need no grid and no common divisor: only those
   reached are stored. A first pass keeps few labels per layer (a beam), which finds good plans; if nothing was cut off
   the box is solved, otherwise it is split in two, or, when it is a single value of t and f, searched more widely.

Round-off: costs are float64 sums of at most 2L terms. A plan counts as no better than another when it is better by
less than `TOLERANCE` of the objective, and the bound returned is lower by that much.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from autopar_solver import stage_dp_kernels as kernels
from autopar_solver.stage_dp_arcs import Arcs, Bools, arcs_of
from autopar_solver.stage_dp_problem import (
    Array,
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
from autopar_solver.stage_dp_prices import Prices, price_devices

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

TOLERANCE = 1e-9
FIRST_CAP = 200  # labels per layer in a box's first pass
SCAN = 400  # labels each new one is compared with
MOST_CAP = 200_000
FINALS = 64

Status = Literal["optimal", "feasible", "infeasible", "unknown"]
Progress = Callable[[float, float, float, float], None]
Interval = tuple[float, float]


@dataclass(frozen=True)
class MissingMemory:
    """Why nothing fits: the least memory, in bytes per device, that would have to be added everywhere.

    Attributes:
        bytes: how many bytes short the best assignment is at its worst stage.
        stages: that assignment. stage: index of its worst stage.
        proven: False if a search limit was met, so that fewer might do.
    """

    bytes: float
    stages: Stages
    stage: int
    proven: bool


@dataclass(frozen=True)
class StageSolution:
    """The best plan found and how far from the optimum it can be.

    Attributes:
        stages: (start, stop, choice) per stage in pipeline order; empty if there is no plan.
        objective: its cost in seconds (`price`); inf if there is no plan.
        bound: no plan costs less. gap: (objective - bound) / objective, 0 where optimal.
        slowest: seconds of the slowest stage.
        runner_ups: other plans met in the search that use another mix of choices, best first; each is feasible and
            priced exactly, but a better runner-up may not have been met.
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
) -> StageSolution:
    """The best plan of a stage problem, with a proof of how good it is.

    Args:
        problem: the stage problem.
        runner_ups: how many other plans to return at most.
        seconds: wall-clock limit; the best plan so far is returned then (and on KeyboardInterrupt). None: no limit.
        gap: stop once (objective - bound) / objective is at most this.
        progress: called now and then with (objective, bound, gap, seconds since the start).
    Raises:
        StageProblemError: `seconds` or `runner_ups` or `gap` is out of range.
    """
    if seconds is not None and not seconds > 0:
        raise StageProblemError(f"seconds must be above 0, got {seconds}; leave it out for no limit")
    if runner_ups < 0 or not gap >= 0:
        raise StageProblemError(f"runner_ups and gap must be >= 0, got {runner_ups} and {gap}")
    search = _Search(problem, seconds, max(gap, TOLERANCE), progress)
    try:
        search.run()
    except KeyboardInterrupt:
        search.interrupted = True
    return search.solution(runner_ups)


@dataclass(frozen=True, eq=False, order=False)
class _Box:
    """An interval of the slowest stage's time and of the largest fixed cost, and the arcs that may be used in it."""

    bound: float
    slow: Interval
    extra: Interval
    arcs: Arcs
    prices: Prices | None = None
    cap: int = FIRST_CAP
    tried: float = math.inf  # arcs there were when labels were last tried

    def __lt__(self, other: _Box) -> bool:
        return self.bound < other.bound


@dataclass
class _Search:
    problem: StageProblem
    limit: float | None
    goal: float
    progress: Progress | None
    interrupted: bool = False
    proven: bool = False
    lost: float = math.inf  # least bound of anything given up
    best: StagePlan | None = None
    plans: dict[Stages, StagePlan] = field(default_factory=dict[Stages, StagePlan])
    open: list[_Box] = field(default_factory=list[_Box])

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.weights = self.problem.weights
        self.available = np.array(self.problem.available, np.int64)
        self.ceiling = math.inf
        self.floor = 0.0

    # -- the loop -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Branch and bound over boxes, best bound first."""
        arcs = arcs_of(self.problem)
        self.ceiling = self._ceiling(arcs)
        if len(arcs):
            slow, extra = (
                self._range(arcs.slow, self.weights.slowest),
                self._range(arcs.extra, self.weights.fixed),
            )
            self._push(_Box(0.0, slow, extra, arcs))
        while self.open:
            if self._out_of_time():
                return
            box = heapq.heappop(self.open)
            self.floor = max(self.floor, box.bound)
            if box.bound >= self.cut:
                self.open.clear()
                break
            self._report(box.bound)
            self._solve(box)
        self.proven = True

    def _solve(self, box: _Box) -> None:
        """Solve a box, or split it, or find that it holds nothing of interest."""
        while True:
            box = self._tighten(box)
            if box.bound >= self.cut or not len(box.arcs):
                return
            width = self._width(box)
            if width <= self._narrow(box) and (width == 0 or 2 * len(box.arcs) <= box.tried):
                dropped = self._labels(box)
                if dropped >= self.cut:
                    return
                bound = max(box.bound, min(dropped, self.objective))
                box = replace(box, bound=bound, tried=len(box.arcs))
            parts = self._split(box)
            if parts:
                for part in parts:
                    self._push(part)
                return
            if box.cap > MOST_CAP or self._out_of_time():
                self.lost = min(self.lost, box.bound)
                return
            box = replace(box, cap=4 * box.cap)

    def _width(self, box: _Box) -> float:
        """How much the bound of a box can gain by splitting it."""
        slow = self.weights.slowest * (box.slow[1] - box.slow[0])
        return slow + self.weights.fixed * (box.extra[1] - box.extra[0])

    def _narrow(self, box: _Box) -> float:
        """The width at which labels are worth their time."""
        gap = self.cut - box.bound
        return 0.02 * box.bound if self.best is None else min(0.02 * box.bound, 4 * gap)

    def _push(self, box: _Box) -> None:
        if box.bound < self.cut:
            heapq.heappush(self.open, box)

    # -- one box --------------------------------------------------------------------------------------------------

    def _least(self, box: _Box) -> float:
        """What the slowest-stage and fixed terms cost at least in a box."""
        return self.weights.slowest * box.slow[0] + self.weights.fixed * box.extra[0]

    def _tighten(self, box: _Box) -> _Box:
        """The box with new prices and bound, without the arcs that no plan below the cut can use."""
        box = self._snap(box)
        if box.bound >= self.cut:
            return box
        box = self._priced(box, 40 if box.prices is None else 8)
        if box.bound >= self.cut:
            return box
        keep = self._through(box) < self.cut
        if keep.sum() > 0.9 * len(keep):
            return box
        if not keep.any():
            return replace(box, bound=math.inf)
        box = self._snap(replace(box, arcs=box.arcs.where(keep)))
        return box if box.bound >= self.cut else self._priced(box, 4)

    def _priced(self, box: _Box, rounds: int) -> _Box:
        """The box with new prices and the bound they give."""
        least = self._least(box)
        prices = price_devices(self.problem, box.arcs, self.ceiling, box.prices, rounds, self.cut - least)
        for path in prices.paths:
            self._offer(box.arcs, path)
        return replace(box, bound=max(box.bound, prices.bound + least), prices=prices)

    def _through(self, box: _Box) -> Array:
        """For every arc of a box, a bound on the plans that use it."""
        arcs, prices = box.arcs, box.prices
        assert prices is not None
        total = self.weights.total
        transfer = self.problem.transfer if total else np.where(np.isinf(self.problem.transfer), np.inf, 0.0)
        row, before = prices.rows[-1], prices.before[-1]
        priced = kernels.through_bounds(
            arcs.flat, arcs.seconds * total, transfer, row, arcs.positions, before
        )
        slow = np.maximum(arcs.slow, box.slow[0])
        extra = np.maximum(arcs.extra, box.extra[0])
        return priced - float(row @ self.available) + self.weights.slowest * slow + self.weights.fixed * extra

    def _labels(self, box: _Box) -> float:
        """Run the label program on a box; the least bound of what it left out (inf: nothing)."""
        assert box.prices is not None
        arcs = box.arcs
        paths, dropped, _ = kernels.label_pass(
            arcs.flat,
            arcs.seconds,
            arcs.extra,
            self.problem.transfer,
            self.problem.transfer_blocks,
            self.available,
            box.prices.rows,
            box.prices.before,
            np.array(self.weights),
            (*box.slow, *box.extra),
            self.cut,
            box.cap,
            SCAN,
            FINALS,
        )
        for path in paths:
            self._offer(arcs, path[path >= 0])
        return float(dropped)

    def _snap(self, box: _Box) -> _Box:
        """The box with its intervals drawn in to values its arcs can take; its bound is inf if there are none.

        A plan whose slowest stage lies below the interval belongs to another box, so values inside are all that count.
        """
        slow, extra = box.slow, box.extra
        if self.weights.slowest:
            slow = _drawn_in(self._slow_values(box.arcs), slow)
        if self.weights.fixed:
            extra = _drawn_in(box.arcs.extra, extra)
        if slow is None or extra is None:
            return replace(box, bound=math.inf)
        return replace(box, slow=slow, extra=extra)

    def _split(self, box: _Box) -> tuple[_Box, ...]:
        """Two boxes that cover this one, cut where the objective gains most; none if it is a single point."""
        slow_gain = self.weights.slowest * (box.slow[1] - box.slow[0])
        extra_gain = self.weights.fixed * (box.extra[1] - box.extra[0])
        if max(slow_gain, extra_gain) == 0:
            return ()
        arcs = box.arcs
        if slow_gain >= extra_gain:
            parts = _halves(self._slow_values(arcs), box.slow)
            return tuple(self._part(box, part, box.extra, arcs.slow <= part[1]) for part in parts)
        parts = _halves(arcs.extra, box.extra)
        return tuple(self._part(box, box.slow, part, arcs.extra <= part[1]) for part in parts)

    def _part(self, box: _Box, slow: Interval, extra: Interval, keep: Bools) -> _Box:
        assert box.prices is not None
        part = replace(box, slow=slow, extra=extra, arcs=box.arcs.where(keep))
        return replace(part, bound=max(box.bound, box.prices.bound + self._least(part)))

    def _slow_values(self, arcs: Arcs) -> Array:
        """All values the slowest-stage term can take."""
        if not self.problem.transfer_blocks:
            return arcs.slow
        inner = arcs.stop < arcs.layers
        moved = self.problem.transfer[arcs.stop[inner], arcs.kind[inner]]
        return np.concatenate([arcs.seconds, (arcs.seconds[inner][:, None] + moved).ravel()])

    # -- plans, bounds, time --------------------------------------------------------------------------------------

    @property
    def objective(self) -> float:
        """Cost of the best plan known, inf without one."""
        return self.best.objective if self.best is not None else math.inf

    @property
    def objective_or_ceiling(self) -> float:
        return min(self.objective, self.ceiling)

    @property
    def cut(self) -> float:
        """What a plan must be below to be of interest."""
        return self.objective * (1 - self.goal) if self.best is not None else self.ceiling

    def _ceiling(self, arcs: Arcs) -> float:
        """A number above the cost of every plan."""
        if not len(arcs):
            return math.inf
        finite = self.problem.transfer[np.isfinite(self.problem.transfer)]
        moved = float(finite.max(initial=0.0))
        total = arcs.layers * (float(arcs.seconds.max()) + moved)
        slow = float(arcs.seconds.max()) + moved
        terms = (total, slow, float(arcs.extra.max()))
        return 2 * sum(w * x for w, x in zip(self.weights, terms)) + 1e-9

    @staticmethod
    def _range(values: Array, weight: float) -> Interval:
        """The interval of a term, a point above all values where the term has no weight."""
        top = float(values.max())
        return (float(values.min()), math.inf) if weight else (top, top)

    def _offer(self, arcs: Arcs, path: np.ndarray) -> None:
        """Take note of a plan, if it uses at most the devices there are."""
        used = np.bincount(arcs.kind[path], arcs.devices[path], len(self.available))
        if (used > self.available).any():
            return
        rows = zip(arcs.start[path], arcs.stop[path], arcs.choice[path])
        stages = tuple(sorted((int(i), int(j), int(c)) for i, j, c in rows))
        if stages in self.plans:
            return
        plan = price(self.problem, stages)
        if not math.isfinite(plan.objective) or plan.shortfall > 0:
            return
        self.plans[stages] = plan
        if plan.objective < self.objective:
            self.best = plan

    def _out_of_time(self) -> bool:
        self.interrupted |= self.limit is not None and time.perf_counter() - self.began > self.limit
        return self.interrupted

    def _bound(self) -> float:
        least = min([box.bound for box in self.open] + [self.lost], default=math.inf)
        if not self.proven:
            least = min(least, self.floor)
        return min(least, self.objective * (1 - TOLERANCE)) if self.best is not None else least

    def _report(self, bound: float) -> None:
        if self.progress is not None:
            gap = (
                (self.objective - bound) / self.objective
                if self.best is not None and self.objective
                else math.inf
            )
            self.progress(self.objective, bound, gap, time.perf_counter() - self.began)

    def solution(self, runner_ups: int) -> StageSolution:
        """What was found."""
        took = time.perf_counter() - self.began
        bound = self._bound()
        if self.best is None:
            status: Status = "infeasible" if self.proven and math.isinf(self.lost) else "unknown"
            bound = math.inf if status == "infeasible" else bound
            return StageSolution((), math.inf, bound, math.inf, math.inf, (), took, status)
        gap = max(0.0, (self.objective - bound) / self.objective) if self.objective else 0.0
        status = "optimal" if gap <= self.goal * (1 + 1e-3) else "feasible"
        others = _unlike(sorted(self.plans.values(), key=lambda plan: plan.objective), runner_ups)
        return StageSolution(
            self.best.stages, self.objective, bound, gap, self.best.slowest, others, took, status
        )


def _drawn_in(values: Array, interval: Interval) -> Interval | None:
    """The least and most of the values in an interval, None if there are none."""
    inside = values[(values >= interval[0]) & (values <= interval[1])]
    return (float(inside.min()), float(inside.max())) if len(inside) else None


def _halves(values: Array, interval: Interval) -> tuple[Interval, Interval]:
    """An interval, whose ends are among the values, cut at the median of the distinct values in it."""
    inside = np.unique(values[(values >= interval[0]) & (values <= interval[1])])
    assert len(inside) >= 2
    half = len(inside) // 2
    return (interval[0], float(inside[half - 1])), (float(inside[half]), interval[1])


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
