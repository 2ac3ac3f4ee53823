"""solve(): presolve, then the route that fits what is left, under one clock."""

import math
import time
from collections.abc import Callable

from autopar_solver.choice import Choice, ProgressCallback
from autopar_solver.compact import Compact, compact
from autopar_solver.errors import ProblemError
from autopar_solver.network import InfeasibleProblem
from autopar_solver.presolve import presolve
from autopar_solver.problem import ChoiceProblem
from autopar_solver.run import Run

EXACT_COLUMNS = 400_000


def solve(
    problem: ChoiceProblem,
    *,
    seconds: float,
    seed: int = 0,
    gap: float = 0.0,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    solver: str = "auto",
    clock: Callable[[], float] = time.monotonic,
) -> Choice:
    """Returns the best choice found, its exact cost, and a bound no feasible choice can be below.

    Args:
        problem: what to solve.
        seconds: time limit; may be overrun by the presolve of a very large problem.
        seed: the same seed gives the same choice whenever the limit doesn't bind.
        gap: stop as soon as (objective - bound) / |objective| is at most this.
        workers: threads to use, by default one per core (at most 8); small problems use one.
        progress: called now and then with the state of the solve.
        solver: "auto" for our own routes; "cvxpy" for HiGHS on the plain cvxpy model, "cvxpy:SCIP" (or any
            name cvxpy knows) for another solver on it.
        clock: tells the seconds that the limit is of: by default those on the wall; with `time.process_time`
            a busy machine finds what an idle one does.

    Raises:
        ProblemError: seconds, gap or workers make no sense.
    """
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ProblemError(f"the time limit must be a positive number of seconds, got {seconds}")
    if not (0 <= gap < math.inf):
        raise ProblemError(f"the gap must be a number of at least 0, got {gap}")
    if workers is not None and workers < 1:
        raise ProblemError(f"workers must be at least 1, got {workers}")
    if solver != "auto":
        return _with_cvxpy(problem, seconds, solver)
    run = Run(problem, clock(), seconds, seed, gap, workers, progress, clock)
    try:
        _solve(run)
    except InfeasibleProblem as why:
        return run.infeasible(str(why))
    except KeyboardInterrupt:
        run.note("interrupted: this is the best choice found so far")
    return run.result()


def _solve(run: Run) -> None:
    run.report("presolve")
    reduced = compact(presolve(run.problem))
    run.presolve_seconds = run.elapsed()
    run.note(summary(run, reduced))
    if reduced.n == 0:
        run.offer(reduced.restore(reduced.nodes))
        run.raise_bound(run.objective)
        return
    from autopar_solver.routes import choose_route  # imports numba and HiGHS: only when they are needed

    choose_route(run, reduced)


def _with_cvxpy(problem: ChoiceProblem, seconds: float, solver: str) -> Choice:
    family, _, name = solver.partition(":")
    if family != "cvxpy":
        raise ProblemError(f'solver must be "auto", "cvxpy" or "cvxpy:NAME", got {solver!r}')
    from autopar_solver.cvx import solve_with_cvxpy

    return solve_with_cvxpy(problem, seconds, name or "HIGHS")


def summary(run: Run, c: Compact) -> str:
    """Returns one line on what presolve did."""
    counts = sorted(c.network.counts.items())
    did = ", ".join(f"{number} {what}" for what, number in counts) or "nothing to do"
    return (
        f"presolve {run.elapsed():.2f} s: {run.problem.num_nodes} nodes to {c.n}, {run.problem.num_edges} "
        f"edges to {len(c.nbr) // 2}, {len(c.cost)} choices, {c.segments} memory segments ({did})"
    )
