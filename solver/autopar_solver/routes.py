"""Which method solves what presolve left, and how they share the time."""

import threading

import numpy as np

from autopar_solver.compact import Compact
from autopar_solver.milp import Exact
from autopar_solver.network import InfeasibleProblem
from autopar_solver.represolve import size_of
from autopar_solver.run import Run

EXACT_COLUMNS = 120_000
PATIENCE = 2.0
GLANCE = 1.0
POLISH_MOVES = 20_000


def choose_route(run: Run, c: Compact) -> None:
    """Solves the reduced problem into `run`.

    Where the caller accepts a gap, a glance at the dual often closes it: most sharding problems are nearly
    trees. A core whose integer program is small then goes to HiGHS alone for a moment, which keeps the
    outcome a function of the seed; if that isn't enough, the search runs beside it. A larger core goes to
    the prices and the search at once.
    """
    if run.gap > 0 and glance(run, c):
        return
    job = None
    if size_of(c) <= EXACT_COLUMNS:
        job = ExactJob(run, c)
        job.start()
        try:
            job.wait(PATIENCE)
        except KeyboardInterrupt:
            job.exact.stop()
            job.join()
            raise
    if job is None or job.is_alive():
        from autopar_solver.large import large_route  # numba: only where it is needed

        try:
            large_route(run, c, job)
        finally:
            if job is not None:
                job.exact.stop()
                job.join()
    if job is not None:
        job.settle()


def glance(run: Run, c: Compact) -> bool:
    """Returns whether a second of climbing the dual alone closes the gap asked for."""
    from autopar_solver.large import quick_dual  # numba: only where it is needed

    quick_dual(run, c, min(GLANCE, 0.1 * run.left()))
    return run.closed()


class ExactJob(threading.Thread):
    """The exact route in a thread of its own, so that interrupts are heard and a search can run beside it."""

    def __init__(self, run: Run, c: Compact) -> None:
        super().__init__(daemon=True)
        self.of, self.c = run, c
        self.exact = Exact(c, run.left(), run.seed, run.gap, on_bound=run.raise_bound, clock=run.clock)
        self.outcome = None
        self.failed: BaseException | None = None

    def run(self) -> None:
        """Runs HiGHS; a proof ends the whole solve."""
        try:
            self.outcome = self.exact.run()
            if self.outcome.x is not None:
                self.of.offer(self.c.restore(self.outcome.x))
            self.of.raise_bound(self.outcome.bound)
            if self.outcome.optimal or self.outcome.infeasible:
                self.of.prove()
        except BaseException as error:
            self.failed = error

    def wait(self, seconds: float) -> None:
        """Waits for the end, at most this long, reporting progress."""
        end, pause = self.of.elapsed() + seconds, 0.001
        while self.is_alive() and self.of.elapsed() < end and not self.of.done():
            self.join(pause)
            pause = min(0.2, 2 * pause)
            self.of.report("exact")

    def settle(self) -> None:
        """Draws the conclusions once the thread has ended."""
        if self.failed is not None:
            raise self.failed
        assert self.outcome is not None
        out = self.outcome
        self.of.note(f"exact: {out.rows} memory rows, bound {out.bound:.12g}, optimal {out.optimal}")
        if out.infeasible:
            raise InfeasibleProblem("the integer program has no solution")
        if out.optimal and out.x is not None:
            polish(self.of, self.c, out.x)


def polish(run: Run, c: Compact, x: np.ndarray) -> None:
    """Looks for a last improvement below HiGHS's tolerance, and makes its choice the one returned.

    HiGHS decides ties and tolerances by the seed alone; the search beside it by the clock.
    """
    run.settle_on(c.restore(x))
    if run.bound is not None and run.objective is not None and run.bound < run.objective and c.n > 1:
        from autopar_solver.search import Walker, penalised

        walker = Walker(c, penalised(c), x, run.seed)
        walker.chunk(c.cap * 0.0, 0.0, POLISH_MOVES)
        run.offer(c.restore(walker.best_x))
