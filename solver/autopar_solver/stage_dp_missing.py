"""How much memory is missing when no plan fits: bisection over feasibility problems."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from autopar_solver.stage_dp_problem import StagePlan, StageProblem, Stages, Throughput, price
from autopar_solver.stage_dp_search import TOLERANCE, Search

PRECISION = 1e-6  # relative


@dataclass(frozen=True)
class MissingMemory:
    """Why nothing fits: the least memory, in bytes per device, that would have to be added to every device.

    Attributes:
        bytes: how many bytes short the best assignment is at its worst stage.
        stages: that assignment. stage: index of its worst stage.
        bound: no assignment is short of less; within 1e-6 of `bytes` unless the time for the search was up.
    """

    bytes: float
    stages: Stages
    stage: int
    bound: float


def missing_memory(problem: StageProblem, seconds: float) -> MissingMemory | None:
    """The least bytes per device that are missing for any plan to fit, or None if memory is not the reason.

    Args:
        problem: an infeasible problem. seconds: wall-clock limit.
    """
    began = time.perf_counter()
    best = _fitting(problem, np.inf, seconds)[0]
    if best is None:
        return None
    low = 0.0
    while best.shortfall - low > PRECISION * best.shortfall:
        left = seconds - (time.perf_counter() - began)
        if left <= 0:
            break
        middle = (low + best.shortfall) / 2 if low else best.shortfall / 16
        found, proven = _fitting(problem, middle, left)
        if found is not None:
            best = found
        elif proven:
            low = middle
        else:
            break
    return MissingMemory(best.shortfall, best.stages, best.tight, low)


def _fitting(problem: StageProblem, extra: float, seconds: float) -> tuple[StagePlan | None, bool]:
    """A plan that fits with `extra` more bytes on every device, really priced; whether "none" is proven."""
    easier = replace(
        problem,
        time=np.where(np.isfinite(problem.time + problem.fixed), 0.0, np.inf),
        transfer=np.where(np.isfinite(problem.transfer), 0.0, np.inf),
        fixed=np.zeros(()),
        limit=problem.limit + extra,
        objective=Throughput(),
    )
    search = Search(easier, seconds, TOLERANCE, any_plan=True)
    search.run()
    if search.best is None:
        return None, search.proven and np.isinf(search.lost)
    return price(problem, search.best.stages), True
