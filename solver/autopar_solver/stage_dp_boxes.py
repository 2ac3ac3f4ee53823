"""Boxes: intervals of the slowest stage's time and the largest fixed cost, with the arcs allowed there."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from autopar_solver.stage_dp_arcs import Arcs, Bools
from autopar_solver.stage_dp_prices import Prices
from autopar_solver.stage_dp_problem import Array, StageProblem

Interval = tuple[float, float]
FIRST_CAP = 200  # labels per layer in a box's first pass


@dataclass(frozen=True, eq=False, order=False)
class Box:
    """A part of the search space.

    Attributes:
        bound: no plan of this box costs less.
        slow, extra: intervals of the slowest stage's time and of the largest fixed cost, ends included.
        arcs: those that may be used. prices: of this box or of a larger one.
        cap: labels per layer in the next pass. tried: arcs there were in the last pass.
        reach: how far above the bound, relatively, the next pass looks for plans.
    """

    bound: float
    slow: Interval
    extra: Interval
    arcs: Arcs
    prices: Prices | None = None
    cap: int = FIRST_CAP
    tried: float = math.inf
    reach: float = 0.005

    def __lt__(self, other: Box) -> bool:
        return self.bound < other.bound


def least(problem: StageProblem, box: Box) -> float:
    """What the slowest-stage and fixed terms cost at least in a box."""
    return problem.weights.slowest * box.slow[0] + problem.weights.fixed * box.extra[0]


def width(problem: StageProblem, box: Box) -> float:
    """How much the bound of a box can gain by splitting it."""
    slow = problem.weights.slowest * (box.slow[1] - box.slow[0])
    return slow + problem.weights.fixed * (box.extra[1] - box.extra[0])


def snap(problem: StageProblem, box: Box) -> Box:
    """The box with its intervals drawn in to values its arcs can take; its bound is inf if there are none.

    A plan whose slowest stage lies below the interval belongs to another box, so values inside are all that
    count.
    """
    slow, extra = box.slow, box.extra
    if problem.weights.slowest:
        slow = _drawn_in(_slow_values(problem, box.arcs), slow)
    if problem.weights.fixed:
        extra = _drawn_in(box.arcs.extra, extra)
    if slow is None or extra is None:
        return replace(box, bound=math.inf)
    return replace(box, slow=slow, extra=extra)


def split(problem: StageProblem, box: Box) -> tuple[Box, ...]:
    """Two boxes that cover this one, cut where the objective gains most; none if it is a single point."""
    slow_gain = problem.weights.slowest * (box.slow[1] - box.slow[0])
    extra_gain = problem.weights.fixed * (box.extra[1] - box.extra[0])
    if max(slow_gain, extra_gain) == 0:
        return ()
    arcs = box.arcs
    if slow_gain >= extra_gain:
        parts = _halves(_slow_values(problem, arcs), box.slow)
        return tuple(_part(problem, box, part, box.extra, arcs.slow <= part[1]) for part in parts)
    parts = _halves(arcs.extra, box.extra)
    return tuple(_part(problem, box, box.slow, part, arcs.extra <= part[1]) for part in parts)


def _part(problem: StageProblem, box: Box, slow: Interval, extra: Interval, keep: Bools) -> Box:
    assert box.prices is not None
    part = replace(box, slow=slow, extra=extra, arcs=box.arcs.where(keep))
    return replace(part, bound=max(box.bound, box.prices.bound + least(problem, part)))


def _slow_values(problem: StageProblem, arcs: Arcs) -> Array:
    """All values the slowest-stage term can take."""
    if not problem.transfer_blocks:
        return arcs.slow
    inner = arcs.stop < arcs.layers
    moved = problem.transfer[arcs.stop[inner], arcs.kind[inner]]
    return np.concatenate([arcs.seconds, (arcs.seconds[inner][:, None] + moved).ravel()])


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
