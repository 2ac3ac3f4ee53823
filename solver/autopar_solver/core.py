"""Core problems: only the choices that the dual finds cheap, presolved once more, to HiGHS.

Messages and prices that are good for the dual tell what every choice costs at least beyond the cheapest of
its node. An optimum takes few dear ones (the core of a knapsack, Balas & Zemel 1980, is the same idea). How
dear a choice may be follows from how HiGHS fares: twice as much when it proves its answer, less when it
doesn't or when presolve leaves too much.
"""

import math
import threading

import numpy as np

from autopar_solver.bounds import Dual
from autopar_solver.compact import Compact, FloatArray
from autopar_solver.problem import IntArray
from autopar_solver.represolve import solve_presolved
from autopar_solver.submilp import cost_of, lower, restricted, thinned

FIRST_REACH = 1e-2
WIDEN, NARROW, NARROWEST, CLOSER = 2.0, 0.5, 0.1, 1.3
MOST_COLUMNS = 120_000


def excess_costs(dual: Dual) -> FloatArray:
    """Returns, laid out as Compact.cost, what a choice costs beyond the cheapest of its node by the messages.

    With messages where TRW-S converged this is at most what taking the choice adds to the bound.
    """
    c, owner = dual.c, dual.c.half_edge_node
    at = np.repeat(c.off[owner] - dual.moff[:-1], c.k[owner]) + np.arange(len(dual.msg))
    total = dual.theta + np.bincount(at, dual.msg, minlength=len(dual.theta))
    return total - np.repeat(np.minimum.reduceat(total, c.off[:-1]), c.k)


class CoreSearch:
    """Tries wider and wider core problems around the best choice.

    Attributes:
        reach: how much beyond the cheapest a choice may cost in the next try.
        proven: the widest reach that was solved to the end; nothing narrower is tried again.
        patience: factor on the seconds of a try; doubles with every try that HiGHS couldn't finish.
        columns: of the last try.
    """

    def __init__(self, c: Compact, excess: FloatArray, seed: int) -> None:
        self.c, self.excess, self.seed = c, excess, seed
        self.reach: float = 0.0
        self.proven: float = 0.0
        self.patience = 1.0
        self.tried, self.improved, self.columns = 0, 0, 0

    def improve(
        self, x: IntArray, missing: float, seconds: float, stop: threading.Event | None = None
    ) -> IntArray | None:
        """Returns a better feasible choice, or None.

        Args:
            x: a feasible choice; its own choices are kept whatever they cost.
            missing: the cost of x less the bound; a choice dearer than that can't be in any better one.
            seconds: for HiGHS.
            stop: ends the try.
        """
        if not math.isfinite(cost_of(self.c, x)):
            return None
        reach = min(max(self.reach, CLOSER * self.proven) or FIRST_REACH * missing, missing)
        cheap = self.excess <= reach
        cheap[self.c.off[:-1] + x] = True
        keep = [np.flatnonzero(cheap[a:b]) for a, b in zip(self.c.off[:-1], self.c.off[1:])]
        several = np.flatnonzero([len(k) > 1 for k in keep])
        if not len(several):
            self.reach = self.proven = reach * WIDEN
            return None
        whole = restricted(self.c, several, x)
        keep = [keep[i] for i in several.tolist()]
        part = thinned(whole, keep)
        old = np.array([np.searchsorted(k, x[i]) for k, i in zip(keep, several.tolist())], np.int64)
        self.tried += 1
        seed, seconds = self.seed + self.tried, seconds * self.patience
        answer = solve_presolved(part, old, seconds, seed, MOST_COLUMNS, stop)
        self.columns = answer.columns
        if answer.optimal:
            self.reach, self.proven = reach * WIDEN, reach
        else:
            self.reach = reach * float(np.clip(MOST_COLUMNS / max(1, answer.columns), NARROWEST, NARROW))
            if answer.columns <= MOST_COLUMNS:
                self.patience *= 2
        if answer.x is None or not lower(part, answer.x, old):
            return None
        self.improved += 1
        better = x.copy()
        better[several] = [k[s] for k, s in zip(keep, answer.x.tolist())]
        return better
