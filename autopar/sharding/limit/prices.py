"""Prices of memory at every moment, set by a linear program over the plans seen so far.

The best mixture of known plans that keeps within a limit on average is a small linear program; its duals say
what a byte costs at each moment (Dantzig and Wolfe 1960; from the other side it is Kelley's cutting planes on
the Lagrange function). Where one moment binds, there is one price; a plan that is lean at that moment and
spends elsewhere makes the other moment bind as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from autopar.sharding.choices.model import Key
from autopar.sharding.memory.alive import BY, Item, Local
from autopar.sharding.memory.moved import moved_reads
from autopar.sharding.ways.grid import Layout

if TYPE_CHECKING:
    from autopar.sharding.problem.setting import Setting

Floats = npt.NDArray[np.float64]
Steps = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Point:
    """A plan of a priced problem. seconds: without the prices. usage: bytes at every tick."""

    chosen: tuple[int, ...]
    seconds: float
    usage: Steps

    @property
    def peak(self) -> int:
        return int(self.usage.max())


@dataclass(frozen=True)
class Mixture:
    """The best one of known plans.

    Attributes:
        prices: seconds per byte at every tick. seconds: of the mixture, with what it exceeds the limit by.
        shares: of each plan. fits: whether it keeps within the limit.
    """

    prices: Floats
    seconds: float
    shares: Floats
    fits: bool


def mixture(points: Sequence[Point], limit: int, dearest: float) -> Mixture:
    """Returns the mixture of plans that takes least time within a limit of bytes.

    dearest: seconds per byte by which the limit may be exceeded all the same.
    """
    usage = np.stack([point.usage for point in points], axis=1) / limit
    rows = np.flatnonzero((usage > 1).any(axis=1))
    _, first = np.unique(usage[rows], axis=0, return_index=True)
    rows = rows[first]
    unit = max(point.seconds for point in points) or 1.0
    found = cheapest([point.seconds / unit for point in points], usage[rows], 1.0, dearest * limit / unit)
    prices = np.zeros(len(usage))
    prices[rows] = found.duals * unit / limit
    return Mixture(prices, found.cost * unit, found.shares, found.excess < 1e-9)


class Cheapest(NamedTuple):
    """Shares of columns, what they cost and exceed the room by, and what more room would save in each row."""

    shares: Floats
    cost: float
    excess: float
    duals: Floats


def cheapest(costs: Sequence[float], usage: Floats, room: float, dear: float) -> Cheapest:
    """Returns shares of columns, one in all, that cost least: usage · shares ≤ room + excess in every row.

    Args:
        costs: of each column. usage: of each row by each column. dear: what one unit of excess costs.
    """
    rows, columns = usage.shape
    found = linprog(
        [*costs, dear],
        A_ub=np.hstack([usage, np.full((rows, 1), -1.0)]),
        b_ub=np.full(rows, room),
        A_eq=np.array([[1.0] * columns + [0.0]]),
        b_eq=[1.0],
        bounds=(0, None),
        method="highs",
    )
    duals = np.maximum(0.0, -found.ineqlin.marginals)
    return Cheapest(found.x[:-1], float(found.fun), float(found.x[-1]), duals)


class Alive:
    """When which bytes of which nodes are alive, but for what passes by (`memory.BY`)."""

    def __init__(self, items: Iterable[Item]):
        kept = [item for item in items if item.role != BY]
        sizes = [len(item.nbytes) for item in kept]
        self.nodes = np.array([item.node for item in kept])
        self.starts = np.array([item.start for item in kept])
        self.stops = np.array([item.stop for item in kept])
        self.ticks = int(self.stops.max()) + 1
        self._first = np.cumsum([0, *sizes[:-1]])
        self._nbytes = np.concatenate([item.nbytes for item in kept])
        self._items = kept

    def steps(self, chosen: Sequence[int], among: Sequence[int] | None = None) -> Steps:
        """Returns the bytes at every tick of a choice. among: of these nodes only."""
        own = slice(None) if among is None else np.flatnonzero(np.isin(self.nodes, among))
        used = self._nbytes[self._first[own] + np.array(chosen)[self.nodes[own]]]
        steps = np.zeros(self.ticks, np.int64)
        np.add.at(steps, self.starts[own], used)
        np.subtract.at(steps, self.stops[own], used)
        return np.cumsum(steps)

    def cost(self, prices: Floats) -> Iterator[tuple[int, Floats]]:
        """Yields (node, seconds per choice) that bytes cost at prices per byte and tick."""
        passed = np.concatenate([[0.0], np.cumsum(prices)])
        each = passed[self.stops] - passed[self.starts]
        for k in np.flatnonzero(each > 0):
            yield self._items[k].node, each[k] * self._items[k].nbytes


class Running:
    """What is held while an operation runs, whoever else holds it for longer: operands in the layout in which
    it reads them, sums that are not scattered yet. It depends on pairs of choices."""

    def __init__(self, setting: Setting):
        self._setting, self._local = setting, Local(setting.grid)
        self._moved = [(read, *span) for read, span in moved_reads(setting.model)]
        self._spans = np.array([span for _, *span in self._moved]).reshape(-1, 2)
        self._sums = [step for step in setting.model.steps if any(x.any() for x in step.ways.resolving)]

    def nodes(self, prices: Floats) -> Iterator[tuple[int, Floats]]:
        """Yields (node, seconds per choice) that sums cost at prices per byte and tick."""
        for step in self._sums:
            if step.tick < len(prices) and (price := prices[step.tick]) > 0:
                for v, made, times in zip(
                    step.equation.outputs, step.ways.made, step.ways.resolving, strict=True
                ):
                    yield step.node, price * times * self._bytes((step.path, v), made)

    def edges(self, prices: Floats) -> Iterator[tuple[int, int, Floats]]:
        """Yields (node, node, seconds per pair of choices) that operands in a second layout cost."""
        passed = np.concatenate([[0.0], np.cumsum(prices)])
        last = np.minimum(self._spans[:, 1] + 1, len(prices))
        each = passed[last] - passed[np.minimum(self._spans[:, 0], len(prices))]
        done: set[tuple[Key, int]] = set()
        for k in np.flatnonzero(each > 0):
            read, first, _ = self._moved[k]
            home, target = self._setting.model.homes[read.key], read.target
            if home.node == target.node or (read.key, first) in done:
                continue
            done.add((read.key, first))
            other = np.array([[x != y for y in target.layouts] for x in home.layouts])
            yield home.node, target.node, each[k] * other * self._bytes(read.key, target.layouts)[None, :]

    def _bytes(self, key: Key, layouts: Sequence[Layout]) -> Steps:
        return self._local(self._setting.nbytes(self._setting.model.value(key)), layouts)
