"""Which method solves what presolve left, and how they share the time."""

import threading

from autopar_solver.compact import Compact
from autopar_solver.milp import Exact, Outcome
from autopar_solver.network import InfeasibleProblem
from autopar_solver.problem import IntArray
from autopar_solver.run import Run

POLL = 0.02
SMALL_ENTRIES = 300_000


def choose_route(run: Run, c: Compact) -> None:
    """Solves the reduced problem into `run`."""
    if len(c.entry) // 2 <= SMALL_ENTRIES:
        exact_route(run, c)
        return
    from autopar_solver.large import large_route

    large_route(run, c)


def exact_route(run: Run, c: Compact) -> None:
    """HiGHS to the end, in a thread of its own so that an interrupt is heard."""
    exact = Exact(
        c, run.left(), run.seed, run.gap, on_choice=lambda x: _offer(run, c, x), on_bound=run.raise_bound
    )
    outcome = watch(run, exact, None)
    settle(run, c, outcome)


def watch(run: Run, exact: Exact, start: IntArray | None) -> Outcome:
    """Returns the outcome of the exact route; the caller's thread reports progress and hears interrupts meanwhile."""
    got: list[Outcome | BaseException] = []

    def work() -> None:
        try:
            got.append(exact.run(start))
        except BaseException as error:
            got.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        wait = POLL / 20
        while thread.is_alive():
            thread.join(wait)
            wait = min(POLL * 10, wait * 2)
            run.report("exact")
    except KeyboardInterrupt:
        exact.stop()
        thread.join()
        raise
    result = got[0]
    if isinstance(result, BaseException):
        raise result
    return result


def settle(run: Run, c: Compact, outcome: Outcome) -> None:
    """Records what the exact route proved."""
    run.note(f"exact: {outcome.rows} memory rows, bound {outcome.bound:.10g}, optimal {outcome.optimal}")
    if outcome.infeasible:
        raise InfeasibleProblem("the integer program has no solution")
    if outcome.x is not None:
        _offer(run, c, outcome.x)
    run.raise_bound(outcome.bound)
    if outcome.optimal:
        run.prove()


def _offer(run: Run, c: Compact, x: IntArray) -> None:
    run.offer(c.restore(x))
