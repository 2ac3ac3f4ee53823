"""The state of one solve: the clock, the best choice so far, the bound, and what is said to the caller."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from autopar_solver.choice import Choice, Progress, ProgressCallback, Status, relative_gap
from autopar_solver.problem import FORBIDDEN, ChoiceProblem, IntArray


@dataclass
class Run:
    """One solve. `offer` and `raise_bound` may be called from several threads."""

    problem: ChoiceProblem
    began: float
    seconds: float
    seed: int
    gap: float
    workers: int | None
    progress: ProgressCallback | None
    clock: Callable[[], float] = time.monotonic
    index: IntArray | None = None
    objective: int | None = None
    bound: int | None = None
    proven: bool = False
    presolve_seconds: float = 0.0
    lines: list[str] = field(default_factory=list[str])
    lock: threading.Lock = field(default_factory=threading.Lock)

    def elapsed(self) -> float:
        """Seconds since the solve began."""
        return self.clock() - self.began

    def left(self) -> float:
        """Seconds left."""
        return self.seconds - self.elapsed()

    def done(self) -> bool:
        """Whether to stop: time is up, or the gap asked for is reached."""
        return self.left() <= 0 or self.closed()

    def closed(self) -> bool:
        """Whether the objective is proven to within the gap asked for."""
        return self.proven or relative_gap(self.objective, self.bound) <= self.gap

    def offer(self, index: IntArray) -> bool:
        """Takes a choice of the whole problem if it is feasible and better than the best; exact integer
        arithmetic.
        """
        cost = self.problem.cost(index)
        if cost >= FORBIDDEN // 2 or self.problem.check(index):
            return False
        with self.lock:
            if self.objective is not None and cost >= self.objective:
                return False
            self.index, self.objective = index.copy(), cost
        return True

    def settle_on(self, index: IntArray) -> None:
        """Makes a choice the one returned if it is as good as the best: which of equals was met first is
        chance.
        """
        if (
            self.objective is not None
            and self.problem.cost(index) <= self.objective
            and not self.problem.check(index)
        ):
            self.index, self.objective = index.copy(), self.problem.cost(index)

    def raise_bound(self, bound: float | int | None) -> None:
        """Takes a valid lower bound; costs are whole numbers, so it is rounded up."""
        if bound is None or (isinstance(bound, float) and not math.isfinite(bound)):
            return
        with self.lock:
            self.bound = max(math.ceil(bound), -(2**62) if self.bound is None else self.bound)

    def prove(self) -> None:
        """Records that the best choice is optimal."""
        self.proven = True

    def note(self, line: str) -> None:
        """Adds a line to the log."""
        self.lines.append(line)

    def report(self, doing: str) -> None:
        """Tells the caller where the solve stands."""
        if self.progress is not None:
            self.progress(Progress(self.elapsed(), self.objective, self._valid_bound(), doing))

    def result(self) -> Choice:
        """Returns what was found."""
        bound = self._valid_bound()
        optimal = self.objective is not None and (self.proven or bound == self.objective)
        status: Status = "optimal" if optimal else "unknown" if self.objective is None else "feasible"
        if self.objective is None:
            self.note(f"no feasible choice was found in {self.elapsed():.1f} s; give it more time")
        gap = relative_gap(self.objective, bound)
        return Choice(
            self.index,
            self.objective,
            bound,
            gap,
            status,
            self.elapsed(),
            tuple(self.lines),
            self.presolve_seconds,
        )

    def infeasible(self, why: str) -> Choice:
        """Returns the outcome for a problem proven to have no feasible choice."""
        self.note(f"infeasible: {why}")
        return Choice(None, None, None, math.inf, "infeasible", self.elapsed(), tuple(self.lines))

    def _valid_bound(self) -> int | None:
        """A bound can only be at the objective or below it: the excess is what rounding up a float may
        give.
        """
        if self.bound is None or self.objective is None:
            return self.bound
        return int(np.minimum(self.bound, self.objective))
