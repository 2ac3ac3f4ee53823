"""Prices of devices: the Lagrangian bound of a set of arcs, by cutting planes.

L(lambda) = min over plans of (cost + lambda * devices used) - lambda * available is concave and a lower
bound on every plan that uses at most the devices there are. Its maximum is found by Kelley's method ("The
cutting-plane method for solving convex programs", 1960): each shortest path is a cut, a small linear program
proposes the next prices; the point tried lies between the proposal and the best prices so far, which
steadies it (in-out separation; Ben-Ameur & Neto, Networks 2007).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import highspy
import numpy as np

from autopar_solver import stage_dp_kernels
from autopar_solver.stage_dp_arcs import Arcs, Ints
from autopar_solver.stage_dp_problem import Array, StageProblem

kernels: Any = stage_dp_kernels  # numba's functions have no types a checker could use
INWARD = 0.5  # how far towards the best prices so far a proposal is drawn


def moved_cost(problem: StageProblem) -> Array:
    """What transfers add to the sum of the objective, inf where a crossing is forbidden: [L, K, K]."""
    if problem.weights.total:
        return np.array(problem.transfer)
    return np.where(np.isinf(problem.transfer), np.inf, 0.0)


def priced_devices(prices: Array, available: Array | Ints) -> float:
    """prices * available and a little more: what it is taken from stays a lower bound despite round-off."""
    return float(prices @ available) * (1 + kernels.ROUND_OFF)


@dataclass(frozen=True, eq=False)
class Cut:
    """One plan as a cut on L: L(lambda) <= cost + lambda * (used - available)."""

    cost: float
    over: Array  # used - available, [K]
    slow: float
    extra: float


@dataclass(frozen=True, eq=False)
class Prices:
    """Prices tried on a set of arcs.

    Attributes:
        bound: the best L found (seconds of stages and transfers; inf: no plan at all).
        rows: [M, K] prices; row 0 is zero, the best is last.
        before: [M, L+1, K, P+1] of `prefix_bounds`.
        cuts: plans seen. paths: their arcs (indices into the set), as shortest paths gave them.
    """

    bound: float
    rows: Array
    before: Array
    cuts: tuple[Cut, ...]
    paths: tuple[Any, ...]


def price_devices(
    problem: StageProblem,
    arcs: Arcs,
    ceiling: float,
    warm: Prices | None = None,
    rounds: int = 40,
    enough: float = np.inf,
) -> Prices:
    """Prices whose bound is close to the largest there is.

    Args:
        problem: the stage problem. arcs: what may be chosen.
        ceiling: every plan costs less than this.
        warm: prices of a larger set of arcs to start from.
        rounds: shortest paths at most. enough: stop once the bound reaches this.
    """
    search = _Kelley(problem, arcs, ceiling, warm)
    search.run(rounds, enough)
    return search.result()


class _Kelley:
    def __init__(self, problem: StageProblem, arcs: Arcs, ceiling: float, warm: Prices | None):
        total = problem.weights.total
        self.arcs, self.flat = arcs, arcs.flat
        self.cost = arcs.seconds * total
        self.transfer = moved_cost(problem)
        self.available = np.array(problem.available, np.float64)
        self.tried: list[tuple[float, Array, Array]] = []  # (L, prices, before)
        self.cuts: list[Cut] = []
        self.paths: list[Any] = []
        # Where the objective has no sum to trade devices against, prices have no natural scale: their sum is
        # fixed, so
        # high that a plan one device over costs more than any plan of interest.
        self.sum = 0.0 if total else 1000 * ceiling * max(1.0, float(self.available.max()))
        self.evaluate(np.zeros(len(self.available)))
        if self.sum:
            self.evaluate(self.sum / len(self.available) / np.maximum(self.available, 1.0))
        if warm is not None:
            most_slow, most_extra = arcs.slow.max(initial=0), arcs.extra.max(initial=0)
            self.cuts += [cut for cut in warm.cuts if cut.slow <= most_slow and cut.extra <= most_extra]
            for prices in warm.rows[1:][::-1]:
                self.evaluate(prices)
        self.have = np.maximum(self.available, 1.0)
        self.scale = self.sum or max([cut.cost for cut in self.cuts], default=1.0) or 1.0
        self.highs: Any = None
        self.rows = 0  # cuts the linear program has

    def evaluate(self, prices: Array) -> float:
        """L at these prices; remembers the cut."""
        before, whole, path = kernels.prefix_bounds(
            self.flat, self.cost, self.transfer, prices, self.arcs.positions
        )
        value = float(whole) - priced_devices(prices, self.available)
        self.tried.append((value, prices, before))
        if np.isfinite(whole):
            used = np.bincount(self.arcs.kind[path], self.arcs.devices[path], len(prices))
            slow, extra = float(self.arcs.slow[path].max()), float(self.arcs.extra[path].max())
            self.cuts.append(Cut(float(whole - prices @ used), used - self.available, slow, extra))
            self.paths.append(path)
        return value

    def run(self, rounds: int, enough: float) -> None:
        """Cutting planes until the bound is the best there is (to 1e-6), infinite, or `enough`."""
        best = max(self.tried[1 if self.sum else 0 :], key=lambda entry: entry[0])
        radius = 4.0
        for _ in range(rounds):
            if best[0] >= enough or not np.isfinite(best[0]):
                return
            proposal, model, at_edge = self.propose(radius)
            if at_edge:
                radius *= 8
            elif model - best[0] <= 1e-6 * abs(model):
                return
            self.evaluate(INWARD * best[1] + (1 - INWARD) * proposal)
            best = max(self.tried[1 if self.sum else 0 :], key=lambda entry: entry[0])

    def propose(self, radius: float) -> tuple[Array, float, bool]:
        """The prices at which the cuts seen so far allow the most, that value, and whether `radius` held
        them back.

        The variables are scaled so that 1 means: all devices of the kind together cost as much as a plan
        does.
        """
        kinds = len(self.have)
        if self.highs is None:
            self.highs = self._linear_program(kinds)
        for cut in self.cuts[self.rows :]:
            entries = np.append(-cut.over / self.have, 1.0)
            self.highs.addRow(
                -np.inf, cut.cost / self.scale, kinds + 1, np.arange(kinds + 1, dtype=np.int32), entries
            )
        self.rows = len(self.cuts)
        for k in range(kinds):
            self.highs.changeColBounds(k, 0.0, radius)
        self.highs.run()
        solution = np.array(self.highs.getSolution().col_value)
        if self.highs.getModelStatus() != highspy.HighsModelStatus.kOptimal or len(solution) != kinds + 1:
            return self.tried[-1][1], np.inf, True
        scaled = np.maximum(solution[:-1], 0.0)
        return (
            scaled * self.scale / self.have,
            float(solution[-1]) * self.scale,
            bool((scaled >= 0.99 * radius).any()),
        )

    def _linear_program(self, kinds: int) -> Any:
        """max value subject to the cuts (none yet), over scaled prices."""
        highs: Any = highspy.Highs()
        highs.setOptionValue("output_flag", False)
        highs.setOptionValue("threads", 1)
        for _ in range(kinds):
            highs.addVar(0.0, 1.0)
        highs.addVar(-np.inf, 1e9)
        highs.changeColCost(kinds, -1.0)
        if self.sum:
            highs.addRow(1.0, 1.0, kinds, np.arange(kinds, dtype=np.int32), np.ones(kinds))
        return highs

    def result(self) -> Prices:
        """The zero row and the best few rows, best last."""
        ranked = sorted(self.tried[1:], key=lambda entry: entry[0])[-4:]
        chosen = [self.tried[0], *ranked]
        bound = max(value for value, _, _ in chosen)
        rows = np.array([prices for _, prices, _ in chosen])
        before = np.array([table for _, _, table in chosen])
        return Prices(bound, rows, before, tuple(self.cuts[-60:]), tuple(self.paths))


def spread(problem: StageProblem, arcs: Arcs, prices: Prices, factor: float = 1.5) -> Prices:
    """The prices with rows added that make one kind dearer each.

    The best prices say little about a suffix that has used up more of a kind than its share; these do, which
    prunes such suffixes and steers a beam away from them.
    """
    best = prices.rows[-1]
    rows = best[None, :] * (1 + (factor - 1) * np.eye(len(best)))
    cost, moved = arcs.seconds * problem.weights.total, moved_cost(problem)
    tables = [kernels.prefix_bounds(arcs.flat, cost, moved, row, arcs.positions)[0] for row in rows]
    return replace(
        prices,
        rows=np.concatenate([prices.rows[:1], rows, prices.rows[1:]]),
        before=np.concatenate([prices.before[:1], np.array(tables), prices.before[1:]]),
    )
