"""Better plans near one that is known, as long as any are found (large-neighbourhood search, Shaw 1998).

Some operations that lie together are freed, or that keep most alive when memory is shortest; all others stay
as they are. What is left is an integer program solved in hundredths of a second, which knows what values take
in second layouts (`limit/explicit.py`) and, at every moment, how much the others leave. A plan that takes
more than the limit pays for the bytes above it at a price that rises until it fits; from then on it has to.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from autopar.sharding.limit.explicit import explicit
from autopar.sharding.limit.moments import Chosen, Moments, Seen
from autopar.sharding.memory.alive import Item
from autopar.sharding.problem.assemble import Costs, Floats
from autopar.sharding.problem.solving import minimise

SIZES = 12, 24, 48, 80
"""Nodes that are freed at once."""

SECONDS, ROUGH = 0.3, 1e-3
"""What one program may take, and how near its best is near enough."""

VAIN, TIRED = 12, 48
"""Programs in a row without a better plan after which memory gets dearer, or the search ends."""

DEARER = 2.0
"""Times the price of a byte then."""

CROWDED = 8
"""Moments of most memory at one of which what is alive is freed."""

SPOTS = 4
"""Places at once where what is freed then lies."""


@dataclass(frozen=True)
class _Now:
    """Where the search stands. used: bytes at every tick."""

    seen: Seen
    used: Floats


class Vicinity:
    """Looks for better plans of one region within a limit.

    Args:
        limit: bytes.
    """

    def __init__(self, moments: Moments, limit: int):
        self._moments, self._limit = moments, limit
        self._random = random.Random(0)
        self._costs = _explicit_of(moments)
        self._own = len(moments.costs.nodes)
        self._ticks = moments.ticks + 1
        self._near: list[dict[int, Floats]] = [{} for _ in self._costs.nodes]
        for (a, b), matrix in self._costs.edges.items():
            self._near[a][b] = self._near[a].get(b, 0.0) + matrix
            self._near[b][a] = self._near[b].get(a, 0.0) + matrix.T
        self._items: list[list[Item]] = [[] for _ in self._costs.nodes]
        for item in self._costs.items:
            self._items[item.node].append(item)

    def search(self, start: Seen, price: float, deadline: float) -> Iterator[Seen]:
        """Yields better and better plans, the ones that take more than the limit included.

        Args:
            price: seconds per byte above the limit, to begin with. deadline: of `time.process_time`.
        """
        now, vain = self._now(start), 0
        while vain < TIRED and time.process_time() < deadline:
            chosen = self._improved(now, price)
            found = None if chosen is None or chosen == now.seen.chosen else self._moments.see(chosen)
            if found is not None and self.score(found, price) < self.score(now.seen, price):
                now, vain = self._now(found), 0
                yield found
                continue
            vain += 1
            if now.seen.peak > self._limit and vain % VAIN == 0:
                price *= DEARER

    def _now(self, seen: Seen) -> _Now:
        single, beside = self._moments.timelines(seen.chosen)
        return _Now(seen, single + beside)

    def score(self, seen: Seen, price: float) -> float:
        """Returns the seconds of a plan, and what the bytes above the limit cost."""
        return seen.seconds + price * max(0, seen.peak - self._limit)

    # what is freed
    def _freed(self, now: _Now) -> list[int]:
        """Returns nodes that lie together, or around some that keep much alive when memory is shortest."""
        size = self._random.choice(SIZES)
        if self._random.random() < 0.5:
            return self._around(self._random.randrange(self._own), size)
        tick = int(self._random.choice(np.argsort(-now.used)[:CROWDED].tolist()))
        alive = [
            item.node
            for item in self._costs.items
            if item.start <= tick < item.stop
            and item.node < self._own
            and item.nbytes[now.seen.chosen[item.node]]
        ]
        roots = self._random.choices(alive or [0], k=SPOTS)
        return sorted({node for root in roots for node in self._around(root, size // SPOTS)})

    def _around(self, root: int, size: int) -> list[int]:
        """Returns so many nodes near one."""
        taken, order = {root}, [root]
        for node in order:
            around = [other for other in self._near[node] if other < self._own and other not in taken]
            self._random.shuffle(around)
            for other in around[: size - len(order)]:
                taken.add(other)
                order.append(other)
        return order

    # the program of what is freed
    def _improved(self, now: _Now, price: float) -> Chosen | None:
        """Returns the best choice for some nodes, the rest as it is; None if there is no time to find it."""
        chosen = now.seen.chosen
        own = self._freed(now)
        beside = {node for i in own for node in self._near[i] if node >= self._own}
        free = [*own, *sorted(beside)]
        full = self._with_beside(chosen, beside)
        items = [item for node in free for item in self._items[node]]
        left = self._left(now, items, full)
        costs = self._restricted(free, full, self._prices(now, price), items)
        solved = minimise(costs, left, SECONDS, ROUGH)
        if solved.chosen is None:
            return None
        changed = dict(zip(own, solved.chosen))
        return tuple(changed.get(i, k) for i, k in enumerate(chosen))

    def _with_beside(self, chosen: Chosen, beside: set[int]) -> dict[int, int]:
        """Returns the choice of every node, and of those for second layouts the one that goes with it."""
        full = dict(enumerate(chosen))
        for node in beside:
            rows = [matrix[:, chosen[other]] for other, matrix in self._near[node].items()]
            full[node] = int(np.argmin(np.sum(rows, axis=0)))
        return full

    def _left(self, now: _Now, items: list[Item], full: dict[int, int]) -> list[int]:
        """Returns the bytes at every tick that what is freed may use: as much more as there is below the
        limit, or at no moment more than is used at the worst one."""
        steps = np.zeros(self._ticks + 1)
        for item in items:
            used = item.nbytes[full[item.node]]
            steps[min(item.start, self._ticks)] += used
            steps[min(item.stop, self._ticks)] -= used
        most = max(float(self._limit), float(now.used.max()))
        return np.maximum(0.0, most - now.used + np.cumsum(steps)[:-1]).astype(np.int64).tolist()

    def _prices(self, now: _Now, price: float) -> Floats:
        """Returns the price of a byte up to every tick: it is paid at the worst moments above the limit."""
        over, prices = now.used - self._limit, np.zeros(self._ticks + 1)
        if over.max() > 0:
            high = np.flatnonzero(over > over.max() / 2)
            runs = np.split(high, np.flatnonzero(np.diff(high) > 1) + 1)
            worst = [int(run[np.argmax(over[run])]) for run in runs]
            prices[np.array(worst) + 1] = price * min(2, len(worst)) / len(worst)
        return np.cumsum(prices)

    def _restricted(self, free: list[int], full: dict[int, int], paid: Floats, items: list[Item]) -> Costs:
        """Returns the costs of some nodes, all others as chosen."""
        place = {node: k for k, node in enumerate(free)}
        nodes, edges = [], {}
        for node in free:
            cost = self._costs.nodes[node].copy()
            for other, matrix in self._near[node].items():
                if other not in place:
                    cost += matrix[:, full[other]]
                elif place[node] < place[other]:
                    edges[place[node], place[other]] = matrix
            nodes.append(cost)
        for item in items:
            nodes[place[item.node]] += (paid[min(item.stop, self._ticks)] - paid[item.start]) * item.nbytes
        mine = tuple(replace(item, node=place[item.node]) for item in items)
        return Costs(tuple(nodes), edges, mine, (None,) * len(free), tuple(range(len(free))))


def _explicit_of(moments: Moments) -> Costs:
    """Returns the costs with all memory of single nodes; made once for all limits."""
    known = moments.setting.known
    if "explicit" not in known:
        known["explicit"] = explicit(moments)
    return known["explicit"]
