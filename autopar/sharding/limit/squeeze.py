"""Plans within a memory limit, found by prices of memory at every moment; the least that any plan takes.

What is alive at a moment (`limit/moments.py`) can be priced: at a price per byte and moment, the best
choice is that of a problem without a limit, which is solved fast and to a proven bound. The prices come from
a linear program over the choices seen so far (Dantzig and Wolfe 1960): mix them at least cost, so that at
every moment the mixture is within the limit. Every answer joins the mixture, until none makes it cheaper.
Where the best mixture is of several choices, that node in whose priced bytes they differ most takes more than
they do on average, or not: each is looked at for itself (branch and price; Barnhart et al. 1998). By
Lagrangian duality each answer bounds the seconds of every plan that fits; with seconds left out of it, the
bytes that every plan takes at some moment.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from autopar.sharding.limit.lowered import SMALL, attempts, bounded, expected
from autopar.sharding.limit.moments import Chosen, Floats, Moments, Seen, known_of, moments_of, remember
from autopar.sharding.limit.prices import cheapest
from autopar.sharding.limit.vicinity import Vicinity
from autopar.sharding.problem.solving import minimise

if TYPE_CHECKING:
    from autopar.sharding.problem.setting import Setting

Barred: TypeAlias = dict[int, npt.NDArray[np.bool_]]
"""Node → whether each of its choices may not be taken."""

ROUNDS, FEW = 60, 4
"""Choices looked at, at most: while nothing is decided, and below each decision."""

PENALTY = 1e3
"""Seconds, in units of the fastest plan's, for exceeding the limit by as much again."""

CLOSE = 1e-4
"""Relative improvement of the mixture below which it is the best one."""

NEAR = 1e-3
"""How near the best an answer and a proof have to be; and by how much better than the best plan a part has to
promise to be for it to be looked at."""

ANSWER, PROOF = 1.0, 1.0
"""Seconds for one answer and one proof, at most."""

DEAR, AROUND = 2.0, 2.0
"""Times the price of a byte at which plans near known ones are looked for, to begin with, and times as many
seconds as asked for, from each."""

LONGER = 1.0
"""Times as many seconds as asked for are spent on branching, at most."""


class Mixture(NamedTuple):
    """The best one of choices. prices: seconds per byte and tick. seconds: what it costs. shares: of each.
    fits: within the limit."""

    prices: Floats
    seconds: float
    columns: list[Seen]
    shares: Floats
    fits: bool


@dataclass
class Squeezed:
    """What has been found.

    Attributes:
        fastest: of the choices within the limit. leanest: of all.
        seconds: no plan within the limit takes less; infinite if none fits.
        promise: seconds of the best mixture: hardly a plan takes less. least: bytes that every plan takes.
    """

    fastest: Seen | None = None
    leanest: Seen | None = None
    seconds: float = -math.inf
    promise: float = math.inf
    least: float = 0.0


@dataclass
class Squeeze:
    """Looks for plans of one region within a limit.

    Attributes:
        moments: what is alive when. known: of the region, under other limits too.
        limit: bytes. deadline: of `time.process_time`. extra: seconds more, where nothing fits, to learn why.
        ceiling: seconds of a plan that is known; it is branched only as far as that promises a faster one.
    """

    moments: Moments
    known: dict[Hashable, Any]
    limit: int
    deadline: float
    extra: float
    ceiling: float = math.inf
    seen: dict[Chosen, Seen] = field(default_factory=dict[Chosen, Seen])
    found: Squeezed = field(default_factory=Squeezed)

    def run(self) -> Squeezed:
        """Returns what was found: with seconds in the price, and where nothing fits for bytes alone."""
        unit = self._begin()
        setting = self.moments.setting
        self.found.seconds = bounded(setting, self.limit)
        if expected(setting, self.limit) == math.inf and self.found.fastest is None:
            self._excluded()
        if unit and self.found.seconds < self.ceiling:
            self._searched(unit)
        if self.found.fastest is None and self.ceiling == math.inf and not self.found.least:
            self._excluded()
        return self.found

    def prove(self) -> float:
        """Returns seconds that no plan within the limit takes less than, at the prices of the mixture."""
        if unit := self._begin():
            self._root(unit)
        return self.found.seconds

    def _begin(self) -> float:
        """Judges what is known; returns the unit of seconds, 0 where nothing is."""
        self.seen = known_of(self.moments.setting)
        for seen in self.seen.values():
            self._judge(seen)
        if not self.seen:
            self._answer(np.zeros(self.moments.ticks), 1.0)
        return min((s.seconds for s in self.seen.values()), default=0.0)

    def _searched(self, unit: float) -> None:
        """Looks for plans, at prices at first. unit: of seconds."""
        mixture = self._root(unit)
        self.found.promise = mixture.seconds
        small = len(self.moments.costs.nodes) <= SMALL
        if small and (self._worth(mixture) or not mixture.fits):
            self._attempt(mixture)
        if small and self._worth(mixture):
            self.deadline = time.process_time() + LONGER * self.extra
            self._branch(unit, mixture)
        if small and (self._worth(mixture) or not mixture.fits):
            self._look_around(DEAR * float(mixture.prices.sum()))

    def _excluded(self) -> None:
        """Looks for the least that every plan takes; of a region that has no plan at all nothing is known."""
        if not self.seen:
            return
        self.deadline = time.process_time() + self.extra
        self._generate(0.0)
        if self.found.seconds == math.inf:
            self.found.least = max(self.found.least, self.limit + 1.0)

    # the mixture
    def _root(self, unit: float) -> Mixture:
        """Returns the best mixture while nothing is decided; found once for a limit."""
        key = "root", self.limit
        if key not in self.known:
            self.known[key] = self._generate(unit), self.found.seconds
        mixture, proven = self.known[key]
        self.found.seconds = max(self.found.seconds, proven)
        return mixture

    def _generate(self, unit: float) -> Mixture:
        """Adds choices until the mixture is the best one. unit: of seconds; 0: only bytes count."""
        worth = 1.0 if unit else 0.0
        near = next(iter(self.seen))
        mixture = self._mix(unit, [*self.seen.values()])
        for _ in range(ROUNDS):
            chosen, least = self._answer(mixture.prices, worth)
            near = chosen or near
            if least is None or time.process_time() > self.deadline:
                break
            if mixture.seconds - least < CLOSE * abs(mixture.seconds):
                break
            mixture = self._mix(unit, [*self.seen.values()])
        self._prove(mixture.prices, worth, near)
        return mixture

    def _mix(self, unit: float, columns: list[Seen]) -> Mixture:
        """Returns the best mixture (prices in shares, where only bytes count)."""
        usage = np.array([s.usage for s in columns]).T / self.limit
        rows = np.flatnonzero(usage.max(axis=1) > (1.0 if unit else 0.0))
        rows = rows[_peaks(usage[rows])]
        costs = [s.seconds / unit if unit else 0.0 for s in columns]
        room, dear = (1.0, PENALTY) if unit else (0.0, 1.0)
        found = cheapest(costs, usage[rows], room, dear)
        prices = np.zeros(self.moments.ticks)
        prices[rows] = found.duals
        scaled = prices * (unit / self.limit if unit else 1.0)
        return Mixture(scaled, found.cost * (unit or self.limit), columns, found.shares, found.excess < CLOSE)

    # one answer
    def _answer(
        self, prices: Floats, worth: float, barred: Barred | None = None
    ) -> tuple[Chosen | None, float | None]:
        """Adds the best choice at these prices; returns it, and what no mixture takes less than, None if the
        choice is known or there is none."""
        moments = self.moments
        costs = moments.priced(prices, worth, moments.likely, barred)
        solved = minimise(costs, None, ANSWER, NEAR)
        if solved.chosen is None or solved.chosen in self.seen:
            return solved.chosen, None
        self.seen[solved.chosen] = seen = moments.see(solved.chosen)
        self._judge(seen)
        return solved.chosen, solved.bound - (float(prices.sum()) * self.limit if worth else 0.0)

    def _judge(self, seen: Seen) -> None:
        best, lean = self.found.fastest, self.found.leanest
        if seen.peak <= self.limit and (best is None or seen.seconds < best.seconds):
            self.found.fastest = seen
        if lean is None or seen.peak < lean.peak:
            self.found.leanest = seen

    def _prove(self, prices: Floats, worth: float, near: Chosen) -> None:
        """Learns what these prices prove, of bytes that are certain. near: a good choice at these prices."""
        moments = self.moments
        costs = moments.priced(prices, worth, moments.certain(near))
        solved = minimise(costs, None, PROOF, NEAR)
        total = float(prices.sum())
        if worth:
            self.found.seconds = max(self.found.seconds, solved.bound - total * self.limit)
        elif total > 0:
            self.found.least = max(self.found.least, solved.bound / total)
            if self.found.least > self.limit:
                self.found.seconds = math.inf

    # plans
    def _attempt(self, mixture: Mixture) -> None:
        """Looks at the plans that the integer program finds."""
        for chosen in attempts(self.moments, self.limit, mixture.prices):
            self._judge(remember(self.moments.setting, chosen))

    def _look_around(self, price: float) -> None:
        """Looks for better plans near the one that is best at a price of every byte above the limit, and near
        the fastest within it."""
        around = Vicinity(self.moments, self.limit)
        starts = [min(self.seen.values(), key=lambda seen: around.score(seen, price)), self.found.fastest]
        for start in {start.chosen: start for start in starts if start is not None}.values():
            for seen in around.search(start, price, time.process_time() + AROUND * self.extra):
                self.seen[seen.chosen] = seen
                self._judge(seen)

    # branches
    def _worth(self, mixture: Mixture) -> bool:
        """Whether there may be a plan near a mixture that is better than all that is known."""
        best = self.ceiling if self.found.fastest is None else min(self.ceiling, self.found.fastest.seconds)
        return mixture.fits and mixture.seconds < (1 - NEAR) * best

    def _branch(self, unit: float, root: Mixture) -> None:
        """Looks for better plans where nodes are decided, the most promising part first."""
        count = itertools.count()
        parts: list[tuple[float, int, Barred, Mixture]] = []

        def divide(barred: Barred, mixture: Mixture) -> None:
            split = self._split(mixture)
            if split is None:
                return
            node, heavy = split
            known = barred.get(node, np.zeros(len(heavy), bool))
            for wrong in (heavy, ~heavy):
                heapq.heappush(
                    parts, (mixture.seconds, next(count), {**barred, node: known | wrong}, mixture)
                )

        divide({}, root)
        while parts and time.process_time() < self.deadline:
            _, _, barred, mixture = heapq.heappop(parts)
            if not self._worth(mixture):
                return
            part = self._part(unit, barred, mixture.prices)
            if part is not None and self._worth(part):
                divide(barred, part)

    def _part(self, unit: float, barred: Barred, prices: Floats) -> Mixture | None:
        """Returns the best mixture of what is not barred; None if there is nothing. prices: to begin with."""
        for _ in range(FEW):
            chosen, _ = self._answer(prices, 1.0, barred)
            if chosen is None:
                return None
            columns = [s for s in self.seen.values() if not any(w[s.chosen[n]] for n, w in barred.items())]
            mixture = self._mix(unit, columns)
            if (mixture.prices == prices).all():
                break
            prices = mixture.prices
        return mixture

    def _split(self, mixture: Mixture) -> tuple[int, npt.NDArray[np.bool_]] | None:
        """Returns the node in whose priced bytes the choices of a mixture differ most, and which of its
        choices take more than they do on average; None if there is no such node."""
        mixed = [(s.chosen, float(x)) for s, x in zip(mixture.columns, mixture.shares) if x > 1e-6]
        priced = self.moments.priced(mixture.prices, 0.0, self.moments.likely).nodes
        taken, shares = np.array([chosen for chosen, _ in mixed]), np.array([x for _, x in mixed])
        best, found = 0.0, None
        for node in np.flatnonzero((taken != taken[0]).any(axis=0)):
            held = priced[node][taken[:, node]]
            mean = float(shares @ held)
            if (spread := float(shares @ np.abs(held - mean))) > best:
                best, found = spread, (int(node), priced[node] > mean)
        return found


def _peaks(usage: Floats) -> npt.NDArray[np.int64]:
    """Returns the rows that no other row exceeds in every column: only moments that may be peaks."""
    keep: list[int] = []
    for i in np.argsort(-usage.sum(axis=1), kind="stable"):
        if not any((usage[k] >= usage[i]).all() for k in keep):
            keep.append(int(i))
    return np.array(sorted(keep), dtype=np.int64)


def squeeze(setting: Setting, limit: int, seconds: float, ceiling: float = math.inf) -> Squeezed:
    """Returns the fastest plan found within `limit` bytes, the leanest, and what is proven.

    Args:
        seconds: of processor time to look for one; some more to prove that there is none, or to look for a
            better one.
        ceiling: seconds of a plan that is known; what promises no faster one is not looked for any longer.
    """
    deadline = time.process_time() + seconds
    return Squeeze(moments_of(setting), setting.known, limit, deadline, seconds, ceiling).run()


def promised(setting: Setting, limit: int) -> float:
    """Returns seconds that hardly a plan within a limit takes less than, as far as one was looked for."""
    root = setting.known.get(("root", limit))
    return 0.0 if root is None else root[0].seconds


def proven(setting: Setting, limit: int, seconds: float = 0.0) -> float:
    """Returns seconds that no plan within a limit takes less than. seconds: of processor time to prove more
    than is known."""
    if seconds:
        Squeeze(moments_of(setting), setting.known, limit, time.process_time() + seconds, seconds).prove()
    root = setting.known.get(("root", limit))
    return max(bounded(setting, limit), -math.inf if root is None else root[1])
