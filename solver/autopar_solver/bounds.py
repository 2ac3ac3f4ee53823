"""Lower bounds by memory prices: the Lagrangian dual of the memory rows, each evaluation bounded by TRW-S.

For any prices p >= 0 per segment, min over x of cost(x) + p.(usage(x) - cap) is at most the optimum. The
inner minimum is itself bounded from below by message passing, so any prices and any messages give a valid
bound. Prices climb along a smoothed subgradient with Polyak's step (Polyak 1969).

Round-off: prices are kept on a grid of powers of two so that their running sums are exact, and every bound is
lowered by the largest error that the additions behind it can have made.
"""

import math

import numpy as np

from autopar_solver.compact import Compact, FloatArray
from autopar_solver.kernels import (
    EPS,
    energy,
    graph_of,
    memory_of,
    message_passes,
    price_nodes,
    round_messages,
    usage_of,
)
from autopar_solver.problem import IntArray

PEAKS_AT_ONCE = 3
SPACING = 60


def on_grid(price: FloatArray) -> FloatArray:
    """Returns prices rounded so that every partial sum of them is exact in floating point."""
    total = float(price.sum())
    if total < 1e-280:  # nothing, or too little for a grid
        return np.zeros(len(price))
    unit = 2.0 ** (math.ceil(math.log2(total)) + 1 - 52)
    return np.rint(price / unit) * unit


class Dual:
    """Ascends the dual of a compact problem and keeps the best bound and its prices."""

    def __init__(self, c: Compact) -> None:
        self.c, self.g, self.mem = c, graph_of(c), memory_of(c)
        self.moff = np.concatenate([[0], np.cumsum(c.k[c.half_edge_node])]).astype(np.int64)
        self.msg = np.zeros(int(self.moff[-1]))
        self.theta = np.empty(len(c.cost))
        self.price = np.zeros(c.segments)
        self.best_price = self.price
        self.bound = -math.inf
        self.x = np.zeros(c.n, np.int64)
        self.momentum = np.zeros(c.segments)
        self.step_size, self.stalled, self.evaluations = 1.0, 0, 0
        self.binding = np.zeros(c.segments, np.bool_)
        self.scale = max(1.0, float(c.cap.max())) if c.segments else 1.0

    def evaluate(self, passes: int) -> float:
        """Returns a valid bound at the present prices, after some message passes."""
        price_nodes(self.c.cost, self.c.off, self.mem, self.price, self.theta)
        low, size = message_passes(self.g, self.theta, self.moff, self.msg, passes)
        paid = float(self.price @ self.c.cap)
        size += abs(self.c.const) + 2 * float(np.abs(self.theta).max(initial=0.0)) * self.c.n
        bound = low - paid + self.c.const - EPS * (size + paid * (2 + len(self.price)))
        if bound > self.bound:
            self.bound, self.best_price, self.stalled = bound, self.price.copy(), 0
        else:
            self.stalled += 1
        self.evaluations += 1
        return bound

    def climb(self, target: float, passes: int = 2) -> tuple[IntArray, float, FloatArray]:
        """Takes one step; returns the rounded choice, its cost, and its usage.

        target: the best objective known (inf if none); Polyak's step aims at it.
        """
        bound = self.evaluate(passes if self.evaluations else 20)
        round_messages(self.g, self.theta, self.moff, self.msg, self.x)
        used = usage_of(self.mem, self.x)
        if self.stalled > 15:
            self.step_size *= 0.7
            self.stalled = 0
            self.price, self.momentum[:] = self.best_price.copy(), 0.0
        if self.c.segments:
            self._step(bound, used, target)
        return self.x, energy(self.g, self.c.cost, self.x) + self.c.const, used

    def _step(self, bound: float, used: FloatArray, target: float) -> None:
        self._add_peaks(used - self.c.cap)
        slope = np.where(self.binding, (used - self.c.cap) / self.scale, 0.0)
        slope[(self.price <= 0) & (slope < 0)] = 0.0
        self.momentum = 0.6 * self.momentum + 0.4 * slope
        norm = float(self.momentum @ self.momentum)
        if norm <= 0:
            return
        if not (math.isfinite(target) and target < 3 * abs(self.bound)):
            target = abs(self.bound) * 1.3 + 1
        length = self.step_size * max(target - bound, 1e-3 * abs(self.bound)) / norm
        self.price = on_grid(np.maximum(0.0, self.price + length * self.momentum / self.scale))

    def _add_peaks(self, over: FloatArray) -> None:
        """Lets the worst overused segments have a price: few, far apart, are enough, and climb much
        faster.
        """
        over = over.copy()
        radius = max(1, len(over) // SPACING)
        for _ in range(PEAKS_AT_ONCE):
            t = int(over.argmax())
            if over[t] <= 0:
                return
            self.binding[t] = True
            over[max(0, t - radius) : t + radius + 1] = 0.0
