"""Solves the costs as a choice problem of integers, and explains when nothing fits."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from autopar.core.stopwatch import section
from autopar.sharding.memory.alive import Item, most_alive
from autopar.sharding.problem.assemble import Costs, Floats
from autopar_solver import FORBIDDEN, ChoiceProblem, solve

PICOSECOND = 1e-12
LARGEST_SUM = 2.0**56
"""All costs of a problem together stay below the solver's limit, or the unit is made coarser."""


@dataclass(frozen=True)
class Solved:
    """chosen: a choice per node of the model, or None. objective, bound: seconds. status: the solver's."""

    chosen: tuple[int, ...] | None
    objective: float
    bound: float
    status: str


def minimise(costs: Costs, limit: int | Sequence[int] | None, seconds: float, gap: float) -> Solved:
    """Returns the best choice per node within `limit` bytes at every tick, of which each may have its own
    (None: no limit).

    seconds: of the processor, so that a plan does not depend on what else the machine does.
    """
    unit = unit_of(costs)
    edges = [(pair, matrix) for pair, matrix in costs.edges.items() if matrix.any()]
    problem = ChoiceProblem.build(
        [_ints(node, unit) for node in costs.nodes],
        [pair for pair, _ in edges],
        [_ints(matrix, unit) for _, matrix in edges],
        None if limit is None else usage_of(costs),
        limit,
    )
    with section("solve"):
        found = solve(problem, seconds=seconds, gap=gap, workers=1, clock=time.process_time)
    if found.index is None or found.objective is None:
        return Solved(None, math.inf, math.inf, found.status)
    chosen = tuple(int(found.index[c]) for c in costs.classes)
    bound = -math.inf if found.bound is None else found.bound * unit
    return Solved(chosen, found.objective * unit, bound, found.status)


def unit_of(costs: Costs) -> float:
    """Returns the seconds of one unit of cost: a picosecond, or more when the sums would overflow."""
    total = sum(float(x[np.isfinite(x)].sum()) for x in [*costs.nodes, *costs.edges.values()])
    unit = PICOSECOND
    while total / unit > LARGEST_SUM:
        unit *= 10
    return unit


def usage_of(costs: Costs) -> list[list[tuple[int, int, npt.NDArray[np.int64]]]]:
    """Returns per node its usage items, those of one interval added up."""
    grouped: dict[tuple[int, int, int], npt.NDArray[np.int64]] = {}
    for item in costs.items:
        key = item.node, item.start, item.stop
        grouped[key] = grouped[key] + item.nbytes if key in grouped else item.nbytes
    usage: list[list[tuple[int, int, npt.NDArray[np.int64]]]] = [[] for _ in costs.nodes]
    for (node, start, stop), nbytes in grouped.items():
        usage[node].append((start, stop, nbytes))
    return usage


def least_peak(items: Iterable[Item]) -> int:
    """Returns bytes that no choice can stay below: every item at its smallest."""
    return most_alive([(item.start, item.stop, int(item.nbytes.min())) for item in items])


def _ints(x: Floats, unit: float) -> npt.NDArray[np.int64]:
    finite = np.isfinite(x)
    if finite.all():
        return np.rint(x / unit).astype(np.int64)
    return np.where(finite, np.rint(np.where(finite, x, 0) / unit), FORBIDDEN).astype(np.int64)
