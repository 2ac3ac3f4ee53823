"""The exact route: the local polytope as a mixed-integer program in HiGHS, memory rows separated as they are
violated.

Binary x[i, s] takes choice s at node i. For an edge, y[r, c] carries the cost of the pair (row class r,
column class c), where rows that are equal up to a constant are one class: real edges have few distinct rows,
and the program shrinks by their square. Without the memory rows this is the standard relaxation of
Schlesinger (1976).
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import highspy
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp  # pyright: ignore[reportMissingTypeStubs]

from autopar_solver.compact import Compact, FloatArray
from autopar_solver.problem import IntArray

ROWS_AT_ONCE = 15
COARSE = 1e-7
SLOWER = 3.0
"""HiGHS knows the clock on the wall only: so much faster may that go than the caller's, which is looked at
wherever HiGHS can be interrupted."""


@dataclass(frozen=True, eq=False)
class Model:
    """min cost'v over equality rows; the first `binaries` columns are x, laid out as Compact.cost."""

    cost: FloatArray
    rows: Any
    rhs: FloatArray
    binaries: int
    const: float


def build_model(c: Compact) -> Model:
    """Returns the program of a compact problem without memory rows."""
    nx = len(c.cost)
    costs: list[FloatArray] = []
    at: list[IntArray] = [np.repeat(np.arange(c.n), c.k)]
    col: list[IntArray] = [np.arange(nx)]
    val: list[FloatArray] = [np.ones(nx)]
    rows, ny = c.n, nx
    for e in c.edges.tolist():
        i, j = int(c.half_edge_node[e]), int(c.nbr[e])
        table, row_class, column_class = c.table(e), c.classes(e), c.classes(int(c.rev[e]))
        r, s = np.nonzero(np.isfinite(table))
        y = ny + np.arange(len(r))
        ny += len(r)
        costs.append(table[r, s])
        nr, nc = table.shape
        at += [rows + r, rows + row_class, rows + nr + s, rows + nr + column_class]
        col += [y, c.off[i] + np.arange(c.k[i]), y, c.off[j] + np.arange(c.k[j])]
        val += [np.ones(len(r)), -np.ones(c.k[i]), np.ones(len(r)), -np.ones(c.k[j])]
        rows += nr + nc
    matrix = sp.csr_matrix((np.concatenate(val), (np.concatenate(at), np.concatenate(col))), shape=(rows, ny))
    rhs = np.zeros(rows)
    rhs[: c.n] = 1.0
    return Model(np.concatenate([c.cost, *costs]), matrix, rhs, nx, float(c.const))


@dataclass
class Outcome:
    """What HiGHS found: a choice per node (None if none), a proven lower bound, and whether it is optimal."""

    x: IntArray | None
    bound: float
    optimal: bool
    infeasible: bool = False
    rows: int = 0


class MemoryRows:
    """Turns usages into rows over x, and finds the ones a point violates most."""

    def __init__(self, c: Compact) -> None:
        self.c = c
        self.scale = max(1.0, float(c.cap.max())) if c.segments else 1.0
        self.have: set[int] = set()
        width = np.array([c.k[i] for i in c.item_node], np.int64)
        self.piece_of = np.repeat(np.arange(len(width)), width)
        begin = np.repeat(c.ioff, width)
        local = np.arange(len(self.piece_of)) - np.repeat(np.cumsum(width) - width, width)
        self.x_of = np.repeat(c.off[c.item_node], width) + local
        self.usage = c.iu[begin + local] if len(width) else np.zeros(0)

    def usage_of(self, x: FloatArray) -> FloatArray:
        """Returns the usage per segment of a fractional point."""
        each = np.bincount(self.piece_of, self.usage * x[self.x_of], minlength=len(self.c.ibeg))
        steps = np.zeros(self.c.segments + 1)
        np.add.at(steps, self.c.ibeg, each)
        np.subtract.at(steps, self.c.iend, each)
        return np.cumsum(steps)[:-1]

    def violated(self, x: FloatArray, most: int = ROWS_AT_ONCE) -> list[int]:
        """Returns segments violated by x, the worst first, spread over time."""
        if not self.c.segments:
            return []
        over = self.usage_of(x) - self.c.cap
        picked: list[int] = []
        for t in np.argsort(-over)[:400].tolist():
            if over[t] <= 1e-6 * self.scale or len(picked) >= most:
                break
            if t not in self.have and all(abs(t - z) > self.c.segments / 60 for z in picked):
                picked.append(t)
        return picked

    def row(self, t: int) -> tuple[float, npt.NDArray[np.int32], FloatArray]:
        """Returns (upper bound, columns, coefficients) of a segment's row, scaled to at most about 1."""
        alive = (self.c.ibeg <= t) & (self.c.iend > t)
        take = alive[self.piece_of] & (self.usage > 0)
        return self.c.cap[t] / self.scale, self.x_of[take].astype(np.int32), self.usage[take] / self.scale


def new_highs(seed: int, gap: float) -> Any:
    """Returns a quiet, single-threaded HiGHS."""
    h: Any = highspy.Highs()
    for name, value in {
        "output_flag": False,
        "threads": 1,
        "random_seed": seed % 2**31,
        "mip_rel_gap": gap,
        "mip_abs_gap": 0.0,
    }.items():
        h.setOptionValue(name, value)
    return h


def load_model(h: Any, model: Model, scale: float, upper: FloatArray | None = None) -> None:
    """Passes a model to HiGHS as a linear program (integrality comes later)."""
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(model.cost), len(model.rhs)
    lp.col_cost_ = model.cost / scale
    lp.col_lower_ = np.zeros(len(model.cost))
    lp.col_upper_ = np.ones(len(model.cost)) if upper is None else upper
    lp.row_lower_ = lp.row_upper_ = model.rhs
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_, lp.a_matrix_.index_ = model.rows.indptr, model.rows.indices
    lp.a_matrix_.value_ = model.rows.data
    h.passModel(lp)


def cost_scale(model: Model) -> float:
    """A power of ten that brings costs to about 1e5: HiGHS's tolerances are absolute."""
    return 10.0 ** max(0.0, math.floor(math.log10(max(1.0, np.abs(model.cost).max(initial=0.0) / 1e5))))


class Exact:
    """One run of the exact route; `run` can be interrupted from another thread with `stop`."""

    def __init__(
        self,
        c: Compact,
        seconds: float,
        seed: int = 0,
        gap: float = 0.0,
        on_choice: Callable[[IntArray], None] | None = None,
        on_bound: Callable[[float], None] | None = None,
        upper: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.c, self.seed, self.gap = c, seed, gap
        self.clock, self.end = clock, clock() + seconds
        self.on_choice, self.on_bound, self.upper = on_choice, on_bound, upper
        self.stopped = threading.Event()
        self.bound = -math.inf
        self.rows = MemoryRows(c)

    def stop(self) -> None:
        """Makes `run` return soon."""
        self.stopped.set()

    def run(self, start: IntArray | None = None) -> Outcome:
        """Returns the optimum, or the best found and the bound proven when time is up or `stop` was
        called.
        """
        self.model = build_model(self.c)
        self.scale = cost_scale(self.model)
        self.h = new_highs(self.seed, self.gap)
        try:
            return self._solved(start)
        finally:
            self.h.clear()  # it stays until the collector comes

    def _solved(self, start: IntArray | None) -> Outcome:
        load_model(self.h, self.model, self.scale)
        self._watch()
        if not self._relax():
            return Outcome(None, self.bound, False, rows=len(self.rows.have))
        self._rescale()
        integer = [highspy.HighsVarType.kInteger] * self.model.binaries
        self.h.changeColsIntegrality(
            self.model.binaries, np.arange(self.model.binaries, dtype=np.int32), np.array(integer)
        )
        return self._branch(start)

    def _rescale(self) -> None:
        """Scales by the relaxation's value where a few huge entries would make the tolerances coarse."""
        value = abs(float(self.h.getInfo().objective_function_value)) * self.scale
        scale = 10.0 ** max(0.0, math.floor(math.log10(max(1.0, value / 1e6))))
        if scale < self.scale and self._tolerance() > COARSE * value:
            self.scale, columns = scale, np.arange(len(self.model.cost), dtype=np.int32)
            self.h.changeColsCost(len(columns), columns, self.model.cost / scale)

    def _left(self) -> float:
        return 0.0 if self.stopped.is_set() else self.end - self.clock()

    def _watch(self) -> None:
        """Lets HiGHS look at `stopped` now and then.

        The bounds its callbacks carry are not used: inside its heuristics they are those of a sub-problem.
        """

        stopped, clock, end = self.stopped, self.clock, self.end  # not `self`: HiGHS keeps what it calls

        def interrupt(event: Any) -> None:
            if stopped.is_set() or clock() > end:
                event.interrupt()

        self.h.cbMipInterrupt += interrupt
        self.h.cbSimplexInterrupt += interrupt

    def _note_bound(self, scaled: float) -> None:
        """HiGHS works in floating point, so its bound is lowered before it is believed.

        A dual solution may be infeasible by HiGHS's tolerance of 1e-7 in every column; at any choice the
        columns sum to nodes + edges. Branches may be cut off 1e-6 too early. Twice the first and the second
        are taken off.
        """
        if abs(scaled) < 1e20:
            value = scaled * self.scale + self.model.const
            value -= self._tolerance() + 1e-12 * abs(scaled * self.scale)
            if value > self.bound:
                self.bound = value
                if self.on_bound is not None:
                    self.on_bound(value)

    def _tolerance(self) -> float:
        """How far above the truth HiGHS's tolerances can put a bound."""
        return self.scale * (1e-6 + 2e-7 * (self.c.n + len(self.c.edges)))

    def _point(self) -> FloatArray | None:
        values = np.array(self.h.getSolution().col_value)
        return values[: self.model.binaries] if len(values) >= self.model.binaries else None

    def _add(self, segments: list[int]) -> None:
        for t in segments:
            self.rows.have.add(t)
            upper, columns, values = self.rows.row(t)
            self.h.addRow(-highspy.kHighsInf, upper, len(columns), columns, values)

    def _run_highs(self) -> Any:
        left = self._left() * (1 if self.clock is time.monotonic else SLOWER)
        self.h.setOptionValue("time_limit", float(self.h.getRunTime() + max(0.01, left)))
        self.h.run()
        return self.h.getModelStatus()

    def _relax(self) -> bool:
        """Solves the linear relaxation with its memory rows; False if time ran out."""
        while self._left() > 0:
            status = self._run_highs()
            if status == highspy.HighsModelStatus.kInfeasible:
                return True  # the integer program will say so too
            x = self._point()
            if status != highspy.HighsModelStatus.kOptimal or x is None:
                return False
            self._note_bound(float(self.h.getInfo().objective_function_value))
            violated = self.rows.violated(x)
            if not violated:
                return True
            self._add(violated)
        return False

    def _branch(self, start: IntArray | None) -> Outcome:
        best: IntArray | None = start
        while self._left() > 0:
            if best is not None:
                self._set_start(best)
            status = self._run_highs()
            if status == highspy.HighsModelStatus.kInfeasible:
                return Outcome(None, math.inf, False, infeasible=True, rows=len(self.rows.have))
            info = self.h.getInfo()
            self._note_bound(float(info.mip_dual_bound))
            x = self._point()
            if x is None or info.primal_solution_status != 2:
                break
            choice = self._rounded(x)
            violated = self.rows.violated(_one_hot(self.c, choice))
            if not violated:
                if self.on_choice is not None:
                    self.on_choice(choice)
                optimal = status == highspy.HighsModelStatus.kOptimal
                return Outcome(choice, self.bound, optimal, rows=len(self.rows.have))
            self._add(violated)
        return Outcome(best, self.bound, False, rows=len(self.rows.have))

    def _rounded(self, x: FloatArray) -> IntArray:
        return np.array([x[a:b].argmax() for a, b in zip(self.c.off[:-1], self.c.off[1:])], np.int64)

    def _set_start(self, choice: IntArray) -> None:
        columns = np.arange(self.model.binaries, dtype=np.int32)
        self.h.setSolution(self.model.binaries, columns, _one_hot(self.c, choice))


def _one_hot(c: Compact, choice: IntArray) -> FloatArray:
    x = np.zeros(len(c.cost))
    x[c.off[:-1] + choice] = 1.0
    return x
