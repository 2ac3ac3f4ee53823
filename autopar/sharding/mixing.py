"""A memory limit that binds in a deep graph: some layers take a fast plan, the others a lean one.

Where all like layers take one decision, memory can only be saved in all of them at once, and the best such
plan may be far from what the limit allows. Without a limit but with a price on the bytes that are alive at
the worst time, the merged problem is solved quickly; as the price rises its plans go from the fastest to the
leanest along the convex hull of time over bytes (Lagrange relaxation; Everett 1963). Of the two plans between
which the limit lies, the first layers take one and the rest the other, as many as fit. The price gives a
bound as well: time plus price times bytes, less price times limit, is below the time of every plan that fits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from autopar.core.graph import OpKind, Phase
from autopar.sharding.assemble import Costs, Floats
from autopar.sharding.memory import BY, STATE, Item
from autopar.sharding.model import Model
from autopar.sharding.setting import Setting
from autopar.sharding.solving import Solved, minimise

Choice: TypeAlias = tuple[int, ...]
"""A choice per node of the model."""

LEAN = 1e-6
"""Seconds per byte at which memory is all that counts."""

NEAR = 1e-4
"""Prices are refined until a plan is this near the line between the two that are known."""

CLOSE = 1e-3
"""A plan that fits and is proven to be this near the best is not improved."""

FAR = 0.1
"""A mixture that may be further from the best is looked for at prices of another time, too."""

SLIGHT, FIRST, STEEPER = 0.25, 1e-4, 30.0
"""Where the fastest plan exceeds the limit by less than the first share, prices begin low: the excess costs
the second share of the time. How they rise until a plan fits."""

ROUNDS = 8
"""Prices tried at most; the hull has few corners near the limit."""

BOUNDS, BOUND_SECONDS, NEARLY = 4, 0.5, 0.01
"""Prices tried at most for a bound alone, the seconds that each may take, and how near its best is enough."""

NONE_FITS = Solved(None, math.inf, -math.inf, "unknown")


@dataclass(frozen=True)
class Point:
    """A plan of the priced problem. seconds: without the price. nbytes: that are priced."""

    chosen: Choice
    seconds: float
    nbytes: float


@dataclass(frozen=True)
class Mixer:
    """What is known of a region whose fastest plan does not fit.

    Attributes:
        merged: costs in which like nodes are one. plain: the same of every node.
        items: bytes over time of all nodes. layers: per node the layer it is part of, or None.
        peak: bytes a choice takes. limit: bytes there are.
        solve: gives the best choice for costs, whatever memory there is.
        thorough: whether prices at a second time are tried, too.
    """

    merged: Costs
    plain: Costs
    items: Sequence[Item]
    layers: Sequence[int | None]
    peak: Callable[[Choice], int]
    limit: int
    solve: Callable[[Costs], Solved]
    thorough: bool = True

    @classmethod
    def of(
        cls,
        setting: Setting,
        merged: Costs,
        plain: Costs,
        limit: int,
        solve: Callable[[Costs], Solved],
        thorough: bool = True,
    ) -> Mixer:
        """Returns the mixer of a region's model, with the arguments of `Mixer`."""
        items, layers = setting.items, layers_of(setting.model)
        return cls(merged, plain, items, layers, lambda x: setting.memory(x).peak, limit, solve, thorough)

    def run(self, free: Choice) -> Solved:
        """Returns the best mixture found, with its bound. free: the fastest choice, which does not fit."""
        first = self._worst(free)
        found = [self._between(free, first, 0 if self.thorough else ROUNDS)]
        if self.thorough and not self._another(free, first, found):
            found.append(self._between(free, first, ROUNDS))
            self._another(free, first, found)
        best = min(found, key=lambda each: each.objective)
        return replace(best, bound=max(each.bound for each in found))

    def bound(self, free: Choice, price: float) -> float:
        """Returns seconds that no plan that fits goes below, by prices of what is alive when `free` needs
        most. price: the first one."""
        weights, best = self._weights(self._worst(free)), -math.inf
        fast, lean = self._point(free, weights), None
        for _ in range(BOUNDS):
            found, below = self._at(price, weights)
            if found is None or below <= best * (1 + NEAR):
                break
            best = max(best, below)
            fast, lean = (found, lean) if found.nbytes > self.limit else (fast, found)
            if lean is None:
                price *= 2
            elif fast.nbytes > lean.nbytes:
                price = max(0.0, lean.seconds - fast.seconds) / (fast.nbytes - lean.nbytes)
        return best

    def _another(self, free: Choice, tick: int, found: list[Solved]) -> bool:
        """Returns whether another time than this binds the last mixture found, and one at prices of that time
        is near enough to the best; it is added to what was found."""
        last = found[-1]
        near = last.objective * (1 - CLOSE) <= last.bound
        if last.chosen is None or near or self._worst(last.chosen) == tick:
            return False
        found.append(self._between(free, self._worst(last.chosen), ROUNDS))
        return found[-1].objective * (1 - FAR) <= found[-1].bound

    def _worst(self, chosen: Choice) -> int:
        """Returns the time at which a choice needs most."""
        return int(self._timeline(chosen).argmax())

    def _between(self, free: Choice, tick: int, rounds: int) -> Solved:
        """Returns the best mixture at prices of what is alive at a time, refined so often."""
        weights = self._weights(tick)
        fast = self._point(free, weights)
        fast, lean, bound = self._fitting(fast, weights)
        if lean is None:
            return NONE_FITS
        for _ in range(rounds):
            if fast.nbytes <= lean.nbytes or lean.seconds * (1 - CLOSE) <= bound:
                break
            price = max(0.0, lean.seconds - fast.seconds) / (fast.nbytes - lean.nbytes)
            found, below = self._at(price, weights)
            bound = max(bound, below)
            known = fast.seconds + price * fast.nbytes
            if found is None or found.seconds + price * found.nbytes >= (1 - NEAR) * known:
                break
            if self.peak(found.chosen) <= self.limit:
                lean = found
            else:
                fast = found
        best = min(self._mixtures(fast.chosen, lean.chosen), key=self._seconds)
        return Solved(best, self._seconds(best), bound, "feasible")

    def _fitting(self, fast: Point, weights: Sequence[Floats]) -> tuple[Point, Point | None, float]:
        """Returns the last plan that does not fit and the first that does, as the price of bytes rises, and
        seconds that no plan that fits goes below. fast: the best one without a price."""
        over, price, bound = self.peak(fast.chosen) / self.limit - 1, LEAN, -math.inf
        if over < SLIGHT:
            price = FIRST * fast.seconds / (max(over, NEAR) * self.limit)
        while True:
            price = min(price, LEAN)
            found, below = self._at(price, weights)
            bound = max(bound, below)
            if found is not None and self.peak(found.chosen) <= self.limit:
                return fast, found, bound
            if price == LEAN:
                return fast, None, bound
            fast = found or fast
            price *= STEEPER

    @functools.cached_property
    def _alive(self) -> tuple[npt.NDArray[np.int64], ...]:
        """Node, start and stop of every item, where its bytes begin in the last array, and that."""
        items = [item for item in self.items if item.role != BY]
        sizes = [len(item.nbytes) for item in items]
        return (
            np.array([item.node for item in items]),
            np.array([item.start for item in items]),
            np.array([item.stop for item in items]),
            np.cumsum([0, *sizes[:-1]]),
            np.concatenate([item.nbytes for item in items]),
        )

    def _timeline(self, chosen: Choice) -> npt.NDArray[np.int64]:
        """Returns the bytes alive at every tick, but for what depends on two choices at once."""
        nodes, starts, stops, first, nbytes = self._alive
        used = nbytes[first + np.array(chosen)[nodes]]
        steps = np.zeros(int(stops.max()) + 1, np.int64)
        np.add.at(steps, starts, used)
        np.subtract.at(steps, stops, used)
        return np.cumsum(steps)

    def _weights(self, tick: int) -> list[Floats]:
        """Returns per node of `plain` the bytes of each choice that are alive at a tick."""
        weights = [np.zeros(len(cost)) for cost in self.plain.nodes]
        for item in self.items:
            if item.role != BY and item.start <= tick < item.stop:
                weights[item.node] += item.nbytes
        return weights

    def _at(self, price: float, weights: Sequence[Floats]) -> tuple[Point | None, float]:
        """Returns the best plan at a price of bytes, and seconds that no plan that fits goes below."""
        nodes = [cost.copy() for cost in self.merged.nodes]
        for c, weight in zip(self.merged.classes, weights, strict=True):
            nodes[c] += price * weight
        solved = self.solve(replace(self.merged, nodes=tuple(nodes)))
        if solved.chosen is None:
            return None, -math.inf
        return self._point(solved.chosen, weights), solved.bound - price * self.limit

    def _point(self, chosen: Choice, weights: Sequence[Floats]) -> Point:
        nbytes = sum(float(weight[k]) for weight, k in zip(weights, chosen, strict=True))
        return Point(chosen, self._seconds(chosen), nbytes)

    def _seconds(self, chosen: Choice) -> float:
        costs = self.plain
        own = sum(float(cost[k]) for cost, k in zip(costs.nodes, chosen, strict=True))
        return own + sum(float(m[chosen[a], chosen[b]]) for (a, b), m in costs.edges.items())

    def _mixtures(self, fast: Choice, lean: Choice) -> list[Choice]:
        """Returns the lean plan, and mixtures in which as many layers as fit take the fast one: the first
        ones, or the last ones. What is in no layer stays lean."""
        count = 1 + max((k for k in self.layers if k is not None), default=-1)
        found = [lean]
        for order in (range(count), range(count)[::-1]):
            low, high = 0, count + 1  # low fits
            while high - low > 1:
                middle = (low + high) // 2
                mixture = self._settled(self._blend(fast, lean, {*order[:middle]}))
                if self._fits(mixture):
                    low = middle
                    found.append(mixture)
                else:
                    high = middle
        return found

    def _blend(self, fast: Choice, lean: Choice, layers: set[int]) -> Choice:
        return tuple(f if k in layers else s for f, s, k in zip(fast, lean, self.layers, strict=True))

    def _settled(self, chosen: Choice) -> Choice:
        """Returns the choice with every node that holds no memory, a copy say, at its best for the others."""
        now = list(chosen)
        for i, near in self._free_nodes.items():
            cost = self.plain.nodes[i].copy()
            for j, matrix in near:
                cost += matrix[:, now[j]]
            now[i] = int(cost.argmin())
        return tuple(now)

    @functools.cached_property
    def _free_nodes(self) -> dict[int, list[tuple[int, Floats]]]:
        """Nodes without memory → (neighbour, costs by own choice and the neighbour's)."""
        found: dict[int, list[tuple[int, Floats]]] = {
            i: [] for i in {*range(len(self.plain.nodes))} - {item.node for item in self.items}
        }
        for (a, b), matrix in self.plain.edges.items():
            if a in found:
                found[a].append((b, matrix))
            if b in found:
                found[b].append((a, matrix.T))
        return found

    def _fits(self, chosen: Choice) -> bool:
        return (
            self._timeline(chosen).max() <= self.limit
            and math.isfinite(self._seconds(chosen))
            and self.peak(chosen) <= self.limit
        )


def mixed(setting: Setting, price: float, limit: int) -> Solved:
    """Returns the best mixture of a fast and a lean plan over the layers of a deep region that keeps within a
    limit; none where like parts are not merged.

    Args:
        price: seconds per byte of state and residuals. limit: bytes.
    """
    merged, plain, free = setting.costs(price), setting.plain(price), setting.free(price)
    if free.chosen is None or not setting.deep:
        return NONE_FITS
    whole = setting.region.whole  # of stages there are many
    patience = (2 if whole else 0.5) * setting.options.seconds

    def solve(costs: Costs) -> Solved:
        return minimise(costs, None, patience, setting.options.gap)

    return Mixer.of(setting, merged, plain, limit, solve, thorough=whole).run(free.chosen)


def keeping_products(setting: Setting, price: float, limit: int) -> float:
    """Returns seconds that no plan within a limit goes below that keeps the results of products, whatever
    else it computes again: their bytes, and those of state, have a price, and computing again none.

    Args:
        setting: nothing is computed again. price: seconds per byte. limit: bytes.
    """
    free = setting.free(0.0)
    if free.chosen is None:
        return -math.inf
    ahead = (step for step in setting.model.steps if step.phase is Phase.FORWARD)
    products = (step for step in ahead if step.equation.kind is OpKind.CONTRACTION)
    made = {(step.path, v) for step in products for v in step.equation.outputs}
    items = [item for item in setting.items if item.role == STATE or item.key in made]

    def solve(costs: Costs) -> Solved:
        return minimise(costs, None, BOUND_SECONDS, NEARLY)

    mixer = Mixer.of(setting, setting.costs(0.0), setting.plain(0.0), limit, solve)
    return replace(mixer, items=items).bound(free.chosen, price)


def layers_of(model: Model) -> list[int | None]:
    """Returns per node the layer whose equations run on it, or that reads what lies there."""
    found: list[int | None] = [None] * len(model.nodes)
    for step in model.steps:
        if found[step.node] is None:
            found[step.node] = step.equation.layer
    for read in reversed(model.reads):  # copies are read by what came before them
        if found[read.source.node] is None:
            found[read.source.node] = found[read.target.node]
    for read in model.reads:
        if found[read.target.node] is None:
            found[read.target.node] = found[read.source.node]
    return found
