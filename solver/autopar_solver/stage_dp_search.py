"""Branch and bound over boxes: the loop of the stage program."""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from autopar_solver import stage_dp_boxes as boxes
from autopar_solver import stage_dp_kernels
from autopar_solver.stage_dp_arcs import Arcs, arcs_of
from autopar_solver.stage_dp_boxes import Box, Interval
from autopar_solver.stage_dp_prices import moved_cost, price_devices, priced_devices, spread
from autopar_solver.stage_dp_problem import Array, StagePlan, StageProblem, Stages, price

kernels: Any = stage_dp_kernels  # numba's functions have no types a checker could use
TOLERANCE = 1e-9
SCAN = 400  # labels each new one is compared with
MOST_CAP = 200_000  # labels per layer beyond which a box is given up
FINALS = 64  # plans taken from each pass
NEARBY = 0.02  # how much worse a runner-up may be for it to be looked for
MOST_PLANS = 1000  # remembered for runner-ups

Progress = Callable[[float, float, float, float], None]


@dataclass
class Search:
    """The state of one search: open boxes, the best plan, the clock.

    Attributes:
        problem: what is solved. limit: wall-clock seconds or None. goal: the gap at which to stop.
        progress: called with (objective, bound, gap, seconds). any_plan: stop at the first plan.
        interrupted: stopped before the end. proven: ran to its end.
        lost: least bound of what was given up. best: the best plan. plans: plans met. open: boxes to be
            searched.
    """

    problem: StageProblem
    limit: float | None
    goal: float
    progress: Progress | None = None
    any_plan: bool = False
    interrupted: bool = False
    proven: bool = False
    lost: float = math.inf  # least bound of anything given up
    best: StagePlan | None = None
    plans: dict[Stages, StagePlan] = field(default_factory=dict[Stages, StagePlan])
    open: list[Box] = field(default_factory=list[Box])

    def __post_init__(self) -> None:
        self.began = time.perf_counter()
        self.weights = self.problem.weights
        self.available = np.array(self.problem.available, np.int64)
        self.transfer = np.array(
            self.problem.transfer
        )  # a copy: kernels are compiled for writable arrays only
        self.moved = moved_cost(self.problem)
        self.ceiling = math.inf
        self.floor = 0.0

    def run(self) -> None:
        """Branch and bound over boxes, best bound first."""
        arcs = arcs_of(self.problem)
        self.ceiling = self._ceiling(arcs)
        if len(arcs):
            slow = self._range(arcs.slow, self.weights.slowest)
            extra = self._range(arcs.extra, self.weights.fixed)
            self._push(Box(0.0, slow, extra, arcs))
        while self.open:
            if self._out_of_time() or (self.any_plan and self.best is not None):
                return
            box = heapq.heappop(self.open)
            self.floor = max(self.floor, box.bound)
            if box.bound >= self.cut:
                self.open.clear()
                break
            self._report(box.bound)
            self._solve(box)
        self.proven = True

    def _solve(self, box: Box) -> None:
        """Solve a box, or split it, or find that it holds nothing of interest."""
        while True:
            box = self._tighten(box)
            if box.bound >= self.cut or not len(box.arcs):
                return
            width = boxes.width(self.problem, box)
            if width <= self._narrow(box) and (width == 0 or 2 * len(box.arcs) <= box.tried):
                target = min(self.cut, box.bound * (1 + box.reach)) if box.bound > 0 else self.cut
                dropped = self._labels(box, target)
                if dropped >= self.cut:
                    return
                box = replace(box, bound=max(box.bound, min(dropped, self.objective)))
                if dropped >= target:
                    # Nothing lies below the target: look further when this box is the best again.
                    self._push(replace(box, reach=4 * box.reach))
                    return
                box = replace(box, tried=len(box.arcs))
            parts = boxes.split(self.problem, box)
            if parts:
                for part in parts:
                    self._push(part)
                return
            if box.cap > MOST_CAP or self._out_of_time():
                self.lost = min(self.lost, box.bound)
                return
            box = replace(box, cap=4 * box.cap)

    def _narrow(self, box: Box) -> float:
        """The width at which labels are worth their time."""
        gap = self.cut - box.bound
        return 0.02 * box.bound if self.best is None else min(0.02 * box.bound, 4 * gap)

    def _push(self, box: Box) -> None:
        if box.bound < self.cut:
            heapq.heappush(self.open, box)

    def _tighten(self, box: Box) -> Box:
        """The box with new prices and bound, without the arcs that no plan below the cut can use."""
        box = boxes.snap(self.problem, box)
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
        box = boxes.snap(self.problem, replace(box, arcs=box.arcs.where(keep)))
        return box if box.bound >= self.cut else self._priced(box, 4)

    def _priced(self, box: Box, rounds: int) -> Box:
        """The box with new prices and the bound they give."""
        least = boxes.least(self.problem, box)
        prices = price_devices(self.problem, box.arcs, self.ceiling, box.prices, rounds, self.cut - least)
        for path in prices.paths:
            self._offer(box.arcs, path)
        return replace(box, bound=max(box.bound, prices.bound + least), prices=prices)

    def _through(self, box: Box) -> Array:
        """For every arc of a box, a bound on the plans that use it."""
        arcs, prices = box.arcs, box.prices
        assert prices is not None
        total = self.weights.total
        row, before = prices.rows[-1], prices.before[-1]
        priced = kernels.through_bounds(
            arcs.flat, arcs.seconds * total, self.moved, row, arcs.positions, before
        )
        slow = np.maximum(arcs.slow, box.slow[0])
        extra = np.maximum(arcs.extra, box.extra[0])
        return (
            priced
            - priced_devices(row, self.available)
            + self.weights.slowest * slow
            + self.weights.fixed * extra
        )

    def _labels(self, box: Box, target: float, finals: int = FINALS) -> float:
        """Run the label program on a box for plans below a target; the least bound of what it left out.

        A target not far above the box's bound keeps labels few while good plans are still unknown.
        """
        assert box.prices is not None
        arcs = box.arcs
        prices = spread(self.problem, arcs, box.prices)
        paths, dropped, _ = kernels.label_pass(
            arcs.flat,
            arcs.seconds,
            arcs.extra,
            self.transfer,
            self.problem.transfer_blocks,
            self.available,
            prices.rows,
            prices.before,
            np.array(self.weights),
            (*box.slow, *box.extra),
            target,
            box.cap,
            SCAN,
            finals,
        )
        for path in paths:
            self._offer(arcs, path[path >= 0])
        return min(float(dropped), target) if target < self.cut else float(dropped)

    def look_around(self) -> None:
        """Take note of plans a little worse than the best (one beam near the best's slowest stage)."""
        if self.best is None or self.interrupted:
            return
        more = NEARBY * self.objective
        slowest = self.best.slowest + (more / self.weights.slowest if self.weights.slowest else math.inf)
        fixed = max(float(self.problem.fixed[c, i, j]) for i, j, c in self.best.stages) + more
        arcs = arcs_of(self.problem)
        arcs = arcs.where((arcs.slow <= slowest) & (arcs.extra <= fixed))
        box = self._priced(Box(0.0, (0.9 * self.best.slowest, slowest), (0.0, fixed), arcs), 20)
        box = self._priced(replace(box, arcs=arcs.where(self._through(box) < self.objective + more)), 4)
        self._labels(box, self.objective + more, 10 * FINALS)

    @property
    def objective(self) -> float:
        """Cost of the best plan known, inf without one."""
        return self.best.objective if self.best is not None else math.inf

    @property
    def cut(self) -> float:
        """What a plan must be below to be of interest."""
        return self.objective * (1 - max(self.goal - TOLERANCE, TOLERANCE / 2)) if self.best else self.ceiling

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
        self._remember(plan)
        if plan.objective < self.objective:
            self.best = plan

    def _remember(self, plan: StagePlan) -> None:
        self.plans[plan.stages] = plan
        if len(self.plans) > 2 * MOST_PLANS:
            ranked = sorted(self.plans.values(), key=lambda plan: plan.objective)[:MOST_PLANS]
            self.plans = {plan.stages: plan for plan in ranked}

    def _out_of_time(self) -> bool:
        self.interrupted |= self.limit is not None and time.perf_counter() - self.began > self.limit
        return self.interrupted

    def bound(self) -> float:
        """No plan costs less."""
        least = min([box.bound for box in self.open] + [self.lost], default=math.inf)
        if not self.proven:
            least = min(least, self.floor)
        if self.best is None:
            return least
        # Whatever was dropped was at least the cut of that time, which was no less than today's.
        return min(least, self.cut, self.objective * (1 - TOLERANCE))

    def _report(self, bound: float) -> None:
        if self.progress is not None:
            gap = (self.objective - bound) / self.objective if self.best and self.objective else math.inf
            self.progress(self.objective, bound, gap, time.perf_counter() - self.began)
