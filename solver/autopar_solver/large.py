"""The large route: one thread climbs the dual and sends prices, the others search under them, under one clock."""

import math
import os
import threading
import time
from dataclasses import dataclass

import numpy as np

from autopar_solver.bounds import Dual
from autopar_solver.compact import Compact, FloatArray
from autopar_solver.kernels import Graph
from autopar_solver.problem import IntArray
from autopar_solver.run import Run
from autopar_solver.search import Walker, penalised

DUAL_SHARE = 0.4
FIRST_DUAL_SHARE = 0.06
COOLING_SHARE = 0.85
START_TEMPERATURE = 2e-5


@dataclass
class Board:
    """What the threads of a large solve share: prices, and whether to stop."""

    price: FloatArray
    bound: float
    start: IntArray
    stop: threading.Event


def threads_of(run: Run) -> int:
    """Returns how many threads to use."""
    return run.workers or min(8, os.cpu_count() or 1)


def large_route(run: Run, c: Compact) -> None:
    """Searches until time is up or the gap is closed; the bound and the best choice end up in `run`."""
    dual = Dual(c)
    graph = penalised(c)
    first_dual(run, c, dual)
    board = Board(starting_prices(dual, c), dual.bound, dual.x.copy(), threading.Event())
    jobs = [lambda: climb(run, c, dual, board, graph)]
    jobs += [lambda k=k: walk(run, c, graph, board, k) for k in range(1, max(2, threads_of(run)))]
    run_threads(run, jobs, board.stop)
    run.note(
        f"prices: {dual.evaluations} evaluations, bound {dual.bound:.10g}, {int((dual.best_price > 0).sum())} priced"
    )


def first_dual(run: Run, c: Compact, dual: Dual) -> None:
    """Climbs for a moment, so that the search starts with sensible prices."""
    end = run.elapsed() + FIRST_DUAL_SHARE * run.left()
    while run.elapsed() < end or dual.evaluations < 5:
        if run.done():
            return
        dual_step(run, c, dual)
        run.report("prices")


def dual_step(run: Run, c: Compact, dual: Dual) -> None:
    """One step of the dual; its bound and, if feasible, its rounding go to `run`."""
    target = math.inf if run.objective is None else float(run.objective)
    x, cost, used = dual.climb(target)
    run.raise_bound(dual.bound)
    if math.isfinite(cost) and cost < target and (used <= c.cap).all():
        run.offer(c.restore(x))


def climb(run: Run, c: Compact, dual: Dual, board: Board, graph: Graph) -> None:
    """The dual's thread: climbs for its share of the time or until it stalls, then searches like the others."""
    end = run.elapsed() + DUAL_SHARE * run.left()
    while run.elapsed() < end and not board.stop.is_set() and dual.step_size > 1e-4:
        dual_step(run, c, dual)
        board.price, board.bound = starting_prices(dual, c), dual.bound
    walk(run, c, graph, board, 0)


def starting_prices(dual: Dual, c: Compact) -> FloatArray:
    """Returns the best prices, or a small uniform price while there are none."""
    if dual.best_price.any() or not c.segments:
        return dual.best_price
    return np.full(c.segments, 1e-3 * abs(dual.bound) / (dual.scale * c.segments))


def walk(run: Run, c: Compact, graph: Graph, board: Board, k: int) -> None:
    """A searching thread: cools down from its own temperature, then polishes the best choice of all threads."""
    walker = Walker(c, graph, board.start, run.seed * 64 + k)
    began, polishing = run.elapsed(), False
    sent = math.inf
    while not board.stop.is_set() and not run.done():
        share = (run.elapsed() - began) / max(1e-9, run.seconds - began)
        temperature = 0.0
        if share < COOLING_SHARE and walker.over <= 0:
            temperature = (
                abs(board.bound) * START_TEMPERATURE * 4.0 ** ((k + 1) % 3 - 1) * (1 - share / COOLING_SHARE)
            )
        elif share >= COOLING_SHARE and not polishing and math.isfinite(walker.best):
            polishing = True
            walker.move_to(walker.best_x)
        if walker.chunk(board.price, temperature) < sent:
            sent = walker.best
            run.offer(c.restore(walker.best_x))
    run.note(f"search {k}: {walker.total_moves} moves, best {walker.best + c.const:.10g}")


def run_threads(run: Run, jobs: list, stop: threading.Event) -> None:
    """Runs jobs in threads; this thread reports, hears interrupts, and ends them when the solve is done."""
    failed: list[BaseException] = []

    def guarded(job) -> None:
        try:
            job()
        except BaseException as error:
            failed.append(error)
            stop.set()

    threads = [threading.Thread(target=guarded, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads) and not run.done() and not stop.is_set():
            time.sleep(0.1)
            run.report("search")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failed:
        raise failed[0]
