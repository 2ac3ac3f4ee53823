"""The large route: one thread climbs the dual and sends prices, the others search under them, under one
clock.
"""

import math
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from autopar_solver.bounds import Dual
from autopar_solver.compact import Compact, FloatArray
from autopar_solver.core import CoreSearch, excess_costs
from autopar_solver.kernels import Graph, energy
from autopar_solver.problem import IntArray
from autopar_solver.run import Run
from autopar_solver.search import Walker, penalised
from autopar_solver.submilp import SubMilp, cost_of

DUAL_SHARE = 0.5
FIRST_DUAL_SHARE = 0.06
COOLING_SHARE = 0.85
START_TEMPERATURE = 2e-5
FALL_BEHIND = 2e-3
PATCH_SECONDS = 2.0
RESTART_AT, SETTLING_TIME = 0.15, 0.15
CORE_SHARE, CORE_SECONDS, CORE_TIME = 0.4, 4.0, 0.05
SETTLING_PASSES = 5
RECENT, FLAT = 0.2, 5e-3
STALE, WIDE, LAST_START = 0.05, 0.05, 0.7
CLOSING_SHARE, CLOSING_MOST = 0.02, 4.0


@dataclass
class Board:
    """What the threads of a large solve share: prices, the best choice (value without the constant), when to
    stop.

    rounded is the dual's own choice under its latest prices, feasible or not; climbing: prices still improve.
    """

    price: FloatArray
    bound: float
    rounded: IntArray
    x: IntArray
    const: float
    value: float = math.inf
    climbing: bool = True
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def missing(self, bound: float) -> float:
        """Returns by how much the best choice is above a bound."""
        return self.value + self.const - bound

    def offer(self, x: IntArray, value: float) -> bool:
        """Takes a feasible choice if it is the best of all threads."""
        with self.lock:
            better = value < self.value
            if better:
                self.x, self.value = x.copy(), value
            return better


def new_board(dual: Dual) -> Board:
    """Returns a board without a choice yet."""
    return Board(dual.price, -math.inf, dual.x, dual.x, dual.c.const)


def threads_of(run: Run) -> int:
    """Returns how many threads to use."""
    return run.workers or min(8, os.cpu_count() or 1)


def large_route(run: Run, c: Compact, beside: threading.Thread | None = None) -> None:
    """Searches until time is up or the gap is closed; the bound and the best choice end up in `run`.

    beside: the thread of the exact route, if that is running.
    """
    dual = Dual(c)
    graph = penalised(c)
    board = new_board(dual)
    first_dual(run, c, dual, board)
    jobs: list[Callable[[], None]] = [lambda: climb(run, c, dual, board, graph)]
    extra = threads_of(run) - 1 - (beside is not None)
    jobs += [lambda k=k: Search(run, c, graph, board, k).go() for k in range(1, 1 + max(0, extra))]
    run_threads(run, jobs, board.stop)
    priced = int((dual.best_price > 0).sum())
    run.note(f"prices: {dual.evaluations} evaluations, bound {dual.bound:.10g}, {priced} segments priced")


def first_dual(run: Run, c: Compact, dual: Dual, board: Board) -> None:
    """Climbs for a moment, so that the search starts with sensible prices."""
    end = run.elapsed() + FIRST_DUAL_SHARE * run.left()
    while (run.elapsed() < end or dual.evaluations < 5) and not run.done():
        dual_step(run, c, dual, board)
        run.report("prices")
    if not math.isfinite(board.value):
        board.x = dual.x.copy()


def quick_dual(run: Run, c: Compact, seconds: float) -> None:
    """Climbs the dual alone until the gap is closed, the step size has collapsed or the time is over."""
    dual = Dual(c)
    board, end = new_board(dual), run.elapsed() + seconds
    while run.elapsed() < end and not run.done() and dual.step_size > 1e-4:
        dual_step(run, c, dual, board)
    run.note(f"glance: {dual.evaluations} evaluations, bound {dual.bound:.10g}")


def dual_step(run: Run, c: Compact, dual: Dual, board: Board) -> None:
    """One step of the dual: its prices and bound, and its rounding if that is feasible, go to all."""
    x, cost, used = dual.climb(board.value + c.const)
    run.raise_bound(dual.bound)
    board.price, board.bound, board.rounded = starting_prices(dual, c), dual.bound, x.copy()
    if cost - c.const < board.value and (used <= c.cap).all() and board.offer(x, cost - c.const):
        run.offer(c.restore(x))


def climb(run: Run, c: Compact, dual: Dual, board: Board, graph: Graph) -> None:
    """The dual's thread: climbs for its share of the time or until it stalls, then searches like the
    others.
    """
    end, ascent = run.elapsed() + DUAL_SHARE * run.left(), Ascent()
    while run.elapsed() < end and not board.stop.is_set() and dual.step_size > 1e-4:
        dual_step(run, c, dual, board)
        if wide_gap(board) and ascent.flat(run.elapsed(), dual.bound, board.missing(dual.bound)):
            break
    dual.price = dual.best_price
    dual.evaluate(SETTLING_PASSES)
    board.climbing = False
    Search(run, c, graph, board, 0, CoreSearch(c, excess_costs(dual), run.seed)).go()


class Ascent:
    """The dual's way up."""

    def __init__(self) -> None:
        self.times, self.bounds = list[float](), list[float]()

    def flat(self, now: float, bound: float, missing: float) -> bool:
        """Whether the last fifth of the time since the solve began closed next to nothing of the gap."""
        self.times.append(now)
        self.bounds.append(bound)
        before = bisect_right(self.times, (1 - RECENT) * now) - 1
        return before >= 0 and bound - self.bounds[before] < FLAT * missing


def wide_gap(board: Board) -> bool:
    """Whether there is a feasible choice, far above the bound: rather for want of search than of prices."""
    return math.isfinite(board.value) and board.missing(board.bound) > WIDE * abs(board.bound)


def starting_prices(dual: Dual, c: Compact) -> FloatArray:
    """Returns the best prices, or a small uniform price while there are none."""
    if dual.best_price.any() or not c.segments:
        return dual.best_price
    return np.full(c.segments, 1e-3 * abs(dual.bound) / (dual.scale * c.segments))


class Search:
    """A searching thread: cools down from its own temperature, then polishes the best choice of all threads.

    The first thread (k = 0) also gives HiGHS sub-MILPs and core problems of that choice; the others the
    surroundings of forbidden pairs that are left, and they start again where they find nothing more and the
    gap is wide.
    """

    def __init__(
        self, run: Run, c: Compact, graph: Graph, board: Board, k: int, cores: CoreSearch | None = None
    ):
        self.run, self.c, self.graph, self.board, self.k, self.cores = run, c, graph, board, k, cores
        self.walker = Walker(c, graph, board.x, run.seed * 64 + k)
        self.patches = SubMilp(c, run.seed * 64 + k)
        self.since, self.began = Restarts(), run.elapsed()
        self.polishing, self.on_cores = False, 0.0

    def go(self) -> None:
        """Searches until time is up or the gap is closed."""
        while not self.board.stop.is_set() and not self.run.done():
            share = (self.run.elapsed() - self.began) / max(1e-9, self.run.seconds - self.began)
            cooled = share / COOLING_SHARE
            self.stand(cooled)
            self.walker.chunk(self.board.price, self.temperature(cooled))
            if self.board.offer(self.walker.best_x, self.walker.best):
                self.run.offer(self.c.restore(self.walker.best_x))
            if not closing(self.run) and math.isfinite(self.board.value):
                self.ask_highs()
        self.tell()

    def temperature(self, cooled: float) -> float:
        """Returns the walk's temperature; cooled: 0 at the beginning, from 1 on there is none."""
        hottest = abs(self.board.bound) * START_TEMPERATURE * 4.0 ** ((self.k + 1) % 3 - 1)
        return hottest * max(0.0, 1 - cooled)

    def stand(self, cooled: float) -> None:
        """Moves the walker where it should go on: the dual's rounding, the best choice of all, its own."""
        board, walker, since = self.board, self.walker, self.since
        if self.starts_again(cooled):
            walker.restart(board.rounded)
        elif since.settled(self.run) and board.value < walker.best - self.leave(cooled):
            walker.move_to(board.x)
        elif cooled >= 1 and not self.polishing and math.isfinite(walker.best):
            self.polishing = True
            walker.move_to(walker.best_x)

    def starts_again(self, cooled: float) -> bool:
        """Whether the walker leaves the region it is in for that of the dual's rounding."""
        broken = self.board.value >= self.walker.penalty
        if cooled < 1 and not broken and self.since.due(self.board, self.run):
            return True
        late = self.k == 0 or cooled >= LAST_START
        return not late and self.since.stale(self.walker.best, self.board, self.run)

    def leave(self, cooled: float) -> float:
        """Returns by how much a walker may be behind the best choice before it is moved there."""
        return FALL_BEHIND * abs(self.board.bound) if cooled < 1 else 0.0

    def ask_highs(self) -> None:
        """Gives HiGHS a part of the problem: which part, depends on the thread."""
        if self.k == 0:
            improve_patch(self.run, self.c, self.graph, self.board, self.patches)
        elif math.isfinite(self.walker.best) and self.walker.best >= self.walker.penalty:
            repair(self.run, self.walker, self.board, self.patches)
        spent = self.on_cores > CORE_SHARE * (self.run.elapsed() - self.began)
        if self.cores is not None and not spent:
            self.on_cores += improve_core(self.run, self.c, self.board, self.cores)

    def tell(self) -> None:
        """Notes what was done."""
        run, k, patches, cores = self.run, self.k, self.patches, self.cores
        run.note(f"search {k}: {self.walker.total_moves} moves, best {self.walker.best + self.c.const:.10g}")
        if patches.tried:
            run.note(
                f"sub-MILP {k}: {patches.tried} tried, {patches.improved} improved, "
                f"budget {patches.budget:.0f}"
            )
        if cores is not None:
            run.note(f"cores: {cores.tried} tried, {cores.improved} improved, last {cores.columns} columns")


class Restarts:
    """When a walker should start again from the dual's rounding.

    What it found under much worse prices lies in another region, which it can't leave.
    """

    def __init__(self) -> None:
        self.bound, self.at, self.climbing = -math.inf, -math.inf, True
        self.best, self.found = math.inf, -math.inf

    def due(self, board: Board, run: Run) -> bool:
        """Whether the bound has closed enough of the gap since the last start, or the prices are final."""
        if not math.isfinite(board.value):
            return False
        final = self.climbing and not board.climbing
        near = board.bound - self.bound < RESTART_AT * board.missing(self.bound)
        if math.isfinite(self.bound) and near and not final:
            return False
        self.climbing = board.climbing
        self.bound, self.at = board.bound, run.elapsed()
        return True

    def stale(self, best: float, board: Board, run: Run) -> bool:
        """Whether the gap is wide and the walker has found nothing better for long: it may be in a poor
        region.
        """
        now = run.elapsed()
        if best != self.best:
            self.best, self.found = best, now
        if not (wide_gap(board) and math.isfinite(best) and now > self.found + STALE * run.seconds):
            return False
        self.at, self.best = now, math.inf
        return True

    def settled(self, run: Run) -> bool:
        """Whether the walker had its time since the last start, so that it may be compared with the best."""
        return run.elapsed() > self.at + SETTLING_TIME * run.seconds


def closing(run: Run) -> bool:
    """Whether the end is so near that HiGHS isn't started again: its set-up can't be interrupted."""
    return run.left() < min(CLOSING_MOST, CLOSING_SHARE * run.seconds)


def improve_patch(run: Run, c: Compact, graph: Graph, board: Board, patches: SubMilp) -> None:
    """Frees one neighbourhood of the best choice; HiGHS may take as long as a few search chunks, and longer
    where short tries are of no use."""
    seconds = min(run.left(), PATCH_SECONDS * patches.patience)
    better = patches.improve(board.x, board.price, seconds, board.stop)
    if better is not None and board.offer(better, energy(graph, c.cost, better)):
        run.offer(c.restore(better))


def repair(run: Run, walker: Walker, board: Board, patches: SubMilp) -> None:
    """Frees the surroundings of a forbidden pair of a walker's best choice."""
    better = patches.improve(walker.best_x, board.price, min(run.left(), PATCH_SECONDS), board.stop)
    if better is not None:
        walker.move_to(better)


def improve_core(run: Run, c: Compact, board: Board, cores: CoreSearch) -> float:
    """Gives HiGHS the core problem of the best choice; returns the seconds it took."""
    began = run.elapsed()
    seconds = min(run.left(), max(CORE_SECONDS, CORE_TIME * run.seconds))
    better = cores.improve(board.x, board.missing(board.bound), seconds, board.stop)
    if better is not None and board.offer(better, cost_of(c, better) - c.const):
        run.offer(c.restore(better))
    return run.elapsed() - began


def run_threads(run: Run, jobs: list[Callable[[], None]], stop: threading.Event) -> None:
    """Runs jobs in threads; this thread reports, hears interrupts, and ends them when the solve is done."""
    failed: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
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
