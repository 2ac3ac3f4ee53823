"""A memory limit that binds in a deep graph: some layers take a fast plan, the others a lean one.

Where all like layers take one decision, memory can only be saved in all of them at once, and the best such
plan may be far from what the limit allows. Without a limit but with prices on the bytes that are alive at
each moment, the merged problem is solved quickly; as prices rise its plans go from the fastest to the leanest
along the convex hull of time over bytes (Lagrange relaxation; Everett 1963). Of two plans, between which the
limit lies, the first layers take one and the rest the other, as many as fit, and what is left is filled up
part by part. Prices give a bound as well: time plus the price of all bytes, less the price of the limit, is
below the time of every plan that fits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from autopar.core.graph import OpKind, Phase
from autopar.sharding.choices.model import Model
from autopar.sharding.limit.filling import filled, neighbours, parts, saved
from autopar.sharding.limit.prices import Alive, Point, Running, Steps, mixture
from autopar.sharding.memory.alive import STATE, Item, over_time
from autopar.sharding.problem.assemble import Costs, Floats
from autopar.sharding.problem.setting import Setting
from autopar.sharding.problem.solving import Solved, minimise

Choice: TypeAlias = tuple[int, ...]
"""A choice per node of the model."""

LEAN = 1e-6
"""Seconds per byte at which memory is all that counts."""

NEAR = 1e-3
"""Prices are refined until it is known this well what they can prove: as near as plans of one price are to
their best."""

CLOSE = 1e-3
"""A plan that fits and is proven to be this near the best is not improved."""

SLIGHT, FIRST, STEEPER = 0.25, 1e-4, 6.0
"""Where the fastest plan exceeds the limit by less than the first share, prices begin low: the excess costs
the second share of the time; else the whole limit costs as much as that takes. How they rise until plans
fit."""

ROUNDS, FEW = 12, 8
"""Prices tried at most, for a whole step and for one of several stages; the hull has few corners near the
limit."""

BOUNDS, BOUND_SECONDS, NEARLY = 4, 0.5, 0.01
"""Prices tried at most for a bound alone, the seconds that each may take, and how near its best is enough."""

NONE_FITS = Solved(None, math.inf, -math.inf, "unknown")


@dataclass(frozen=True)
class Mixer:
    """What is known of a region whose fastest plan does not fit.

    Attributes:
        merged: costs in which like nodes are one. plain: the same of every node.
        items: bytes over time of all nodes. layers: per node the layer it is part of, or None.
        limit: bytes there are. solve: gives the best choice for costs, whatever memory there is.
        setting: what says which bytes depend on two choices at once; None: these do not count.
        rounds: prices tried at most.
    """

    merged: Costs
    plain: Costs
    items: Sequence[Item]
    layers: Sequence[int | None]
    limit: int
    solve: Callable[[Costs], Solved]
    setting: Setting | None = None
    rounds: int = ROUNDS

    @classmethod
    def of(
        cls,
        setting: Setting,
        merged: Costs,
        plain: Costs,
        limit: int,
        solve: Callable[[Costs], Solved],
        rounds: int = ROUNDS,
    ) -> Mixer:
        """Returns the mixer of a region's model, with the arguments of `Mixer`."""
        return cls(merged, plain, setting.items, layers_of(setting.model), limit, solve, setting, rounds)

    def run(self, free: Choice) -> Solved:
        """Returns the best mixture found, with its bound. free: the fastest choice, which does not fit."""
        over, seconds = int(self._usage(free).max()) / self.limit - 1, self._seconds(free)
        share = FIRST / max(over, FIRST) if over < SLIGHT else 1.0
        points, used, bound = self._priced(free, share * seconds / self.limit, self.rounds)
        lean = [point for point in points if point.peak <= self.limit]
        if not lean:
            return NONE_FITS
        best = self._mixed(min(lean, key=lambda point: point.seconds), used, bound)
        return Solved(best, self._seconds(best), bound, "feasible")

    def bound(self, free: Choice, price: float, enough: float = math.inf) -> float:
        """Returns seconds that no plan that fits goes below, by prices of what is alive at some moments.
        price: the first one, when `free` needs most. enough: no more need be proven."""
        return self._priced(free, price, BOUNDS, enough)[2]

    def _priced(
        self, free: Choice, price: float, rounds: int, enough: float = math.inf
    ) -> tuple[list[Point], list[Point], float]:
        """Returns plans, those among them of which the best mixture is made, and seconds that no plan that
        fits goes below.

        Args:
            free: whatever memory there is. price: of a byte at first, when `free` needs most; it rises until
                a plan fits. rounds: prices tried at most. enough: a bound that is not improved.
        """
        points, bound = [self._point(free)], -math.inf
        now = mixture(points, self.limit, price)
        for _ in range(rounds):
            solved = self._at(now.prices)
            if solved.chosen is None:
                break
            bound = max(bound, solved.bound - float(now.prices.sum()) * self.limit)
            known = any(point.chosen == solved.chosen for point in points)
            points += [] if known else [self._point(solved.chosen)]
            if bound >= enough:
                break
            if any(point.peak <= self.limit for point in points):
                now = mixture(points, self.limit, LEAN)
                priced = now.seconds + float(now.prices.sum()) * self.limit
                if known or now.seconds - bound <= NEAR * priced:
                    break
            elif price == LEAN:
                break
            else:
                price = min(LEAN, STEEPER * price)
                now = mixture(points, self.limit, price)
        used = [point for point, part in zip(points, now.shares, strict=False) if part > 0]
        return points, used, bound

    def _mixed(self, lean: Point, others: Sequence[Point], bound: float) -> Choice:
        """Returns the fastest mixture found of a plan that fits with others, as many layers or parts of any
        as fit."""
        best = lean.chosen
        for other in sorted(others, key=lambda point: point.seconds):
            best = min(self._mixtures(other.chosen, best), key=self._seconds)
        for other in sorted(others, key=lambda point: point.seconds):
            if self._seconds(best) * (1 - CLOSE) > bound:
                best = self._filled(best, other.chosen)
        return best

    @functools.cached_property
    def _alive(self) -> Alive:
        return Alive(self.items)

    @functools.cached_property
    def _running(self) -> Running | None:
        return None if self.setting is None else Running(self.setting)

    def _at(self, prices: Floats) -> Solved:
        """Returns the best plan at prices of bytes at every tick."""
        nodes, edges = [cost.copy() for cost in self.merged.nodes], dict(self.merged.edges)
        classes, running = self.merged.classes, self._running
        for node, cost in (*self._alive.cost(prices), *(running.nodes(prices) if running else ())):
            nodes[classes[node]] += cost
        for i, j, cost in running.edges(prices) if running else ():
            a, b = classes[i], classes[j]
            if a == b:
                nodes[a] += np.diagonal(cost)
                continue
            (a, b), cost = ((a, b), cost) if a < b else ((b, a), cost.T)
            edges[a, b] = edges[a, b] + cost if (a, b) in edges else cost
        return self.solve(replace(self.merged, nodes=tuple(nodes), edges=edges))

    def _usage(self, chosen: Choice) -> Steps:
        """Returns the bytes that a choice takes at every tick."""
        steps = self._alive.steps(chosen)
        if self.setting is None:
            return steps
        beside = ((held.start, held.stop, held.nbytes) for held in self.setting.held(chosen))
        return steps + over_time(beside, len(steps))

    def _point(self, chosen: Choice) -> Point:
        return Point(chosen, self._seconds(chosen), self._usage(chosen))

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
    def _near(self) -> dict[int, list[tuple[int, Floats]]]:
        return neighbours(self.plain.edges)

    @functools.cached_property
    def _free_nodes(self) -> dict[int, list[tuple[int, Floats]]]:
        """Nodes without memory → (neighbour, costs by own choice and the neighbour's)."""
        holding = {item.node for item in self.items}
        return {i: self._near.get(i, []) for i in range(len(self.plain.nodes)) if i not in holding}

    def _filled(self, best: Choice, fast: Choice) -> Choice:
        """Returns a mixture with the parts in which a faster choice differs taken one by one, as they fit."""
        near, free = self._near, self._free_nodes
        each = parts(best, fast, near, free)
        gains = [(saved(part, best, fast, self.plain, near, free), part) for part in each]
        better = filled(best, gains, fast, self._alive.steps, self.limit - self._usage(best))
        low, high = 0, len(better)
        while high - low > 1:
            middle = (low + high) // 2
            better[middle] = self._settled(better[middle])
            low, high = (middle, high) if self._fits(better[middle]) else (low, middle)
        return min(best, better[low], key=self._seconds)

    def _fits(self, chosen: Choice) -> bool:
        return (
            self._alive.steps(chosen).max() <= self.limit
            and math.isfinite(self._seconds(chosen))
            and self._usage(chosen).max() <= self.limit
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

    return Mixer.of(setting, merged, plain, limit, solve, ROUNDS if whole else FEW).run(free.chosen)


def keeping_products(setting: Setting, price: float, limit: int, enough: float = math.inf) -> float:
    """Returns seconds that no plan within a limit goes below that keeps the results of products, whatever
    else it computes again: their bytes, and those of state, have a price, and computing again none.

    Args:
        setting: nothing is computed again. price: seconds per byte. limit: bytes.
        enough: seconds; no more need be proven.
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
    return replace(mixer, items=items, setting=None).bound(free.chosen, price, enough)


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
