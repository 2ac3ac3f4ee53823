"""Plans within a memory limit, found by prices of memory at every moment; the least that any plan takes.

What is alive at a moment depends on the choices of single nodes (a value in its own layout, sums on their
way) and on pairs of them (a value held in a second layout for its readers). Both can be priced: at a price
per byte and moment, the best choice is that of a problem without a limit, which is solved fast and to a
proven bound. The prices come from a linear program over the choices seen so far (Dantzig and Wolfe 1960):
mix them at least cost, so that at every moment the mixture is within the limit. Every answer joins the
mixture, until none makes it cheaper. By Lagrangian duality each answer bounds the seconds of every plan that
fits; with seconds left out of it, the bytes that every plan takes at some moment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.optimize import linprog

from autopar.sharding.assemble import Costs, assemble
from autopar.sharding.memory import BY, STATE, Local
from autopar.sharding.model import Home, Key
from autopar.sharding.parts import made_elementwise
from autopar.sharding.solving import minimise

if TYPE_CHECKING:
    from autopar.sharding.setting import Setting

Chosen: TypeAlias = tuple[int, ...]
Floats: TypeAlias = npt.NDArray[np.float64]

ROUNDS = 60
"""Choices looked at, at most."""

PENALTY = 1e3
"""Seconds, in units of the fastest plan's, for exceeding the limit by as much again."""

CLOSE = 1e-4
"""Relative improvement of the mixture below which it is the best one; and how near the best an answer is."""

ANSWER = 5.0
"""Seconds for one answer, at most."""


@dataclass(frozen=True, eq=False)
class Term:
    """Bytes in the half-open interval [start, stop) of ticks: per choice of node a, or of a and b."""

    a: int
    b: int | None
    start: int
    stop: int
    nbytes: Floats | npt.NDArray[np.int64]


@dataclass(frozen=True)
class Seen:
    """A choice: seconds, bytes at every tick as priced, and the peak that it really has."""

    chosen: Chosen
    seconds: float
    usage: Floats
    peak: int


class Moments:
    """What is alive when on one device, for every choice.

    Attributes:
        ticks: how many there are. costs: seconds.
        likely: bytes, as far as single choices and pairs of them say.
        certain: the same, without what readers of a shared copy may do without.
    """

    def __init__(self, setting: Setting):
        self.setting = setting
        items = tuple(item for item in setting.items if item.role != BY)
        self.costs = assemble(setting.model, setting.grid, setting.nbytes, items, 0.0)
        self.ticks = 1 + max((item.stop for item in items), default=0)
        resolving = self._resolving()
        self.likely = [*self._alive(whole=True), *resolving, *self._moved(sharing=True)]
        self.certain = [*self._alive(whole=False), *resolving, *self._moved(sharing=False)]

    def see(self, chosen: Chosen) -> Seen:
        """Returns what a choice needs."""
        peak = self.setting.memory(chosen).peak
        return Seen(chosen, self._seconds(chosen), self.usage(chosen, self.likely), peak)

    def priced(self, prices: Floats, worth: float, terms: Sequence[Term]) -> Costs:
        """Returns the costs at prices per byte and tick. worth: of a second."""
        passed = np.concatenate([[0.0], np.cumsum(prices)])
        nodes = [np.where(np.isfinite(c), worth * c, c) for c in self.costs.nodes]
        edges = {k: np.where(np.isfinite(m), worth * m, m) for k, m in self.costs.edges.items()}
        for t in terms:
            price = passed[min(t.stop, self.ticks)] - passed[t.start]
            if price <= 0:
                continue
            if t.b is None:
                nodes[t.a] = nodes[t.a] + price * t.nbytes
                continue
            pair, matrix = ((t.a, t.b), t.nbytes) if t.a < t.b else ((t.b, t.a), t.nbytes.T)
            edges[pair] = edges[pair] + price * matrix if pair in edges else price * matrix
        return Costs(tuple(nodes), edges, (), self.costs.likes, self.costs.classes)

    def _seconds(self, chosen: Chosen) -> float:
        nodes = sum(float(c[k]) for c, k in zip(self.costs.nodes, chosen, strict=True))
        return nodes + sum(float(m[chosen[a], chosen[b]]) for (a, b), m in self.costs.edges.items())

    def usage(self, chosen: Chosen, terms: Sequence[Term]) -> Floats:
        """Returns the bytes at every tick that these terms say."""
        steps = np.zeros(self.ticks + 1)
        for t in terms:
            used = t.nbytes[chosen[t.a]] if t.b is None else t.nbytes[chosen[t.a], chosen[t.b]]
            steps[t.start] += used
            steps[min(t.stop, self.ticks)] -= used
        return np.cumsum(steps)[:-1]

    # what is alive
    def _alive(self, whole: bool) -> list[Term]:
        """Values in their own layouts; state is there from the beginning to the end.

        whole: count all of elementwise results, of which perhaps only parts are read, and thus computed.
        """
        setting, found = self.setting, list[Term]()
        parts = set[Key]() if whole else made_elementwise(setting.model)
        devices = math.prod(setting.grid.sizes)
        for item in (item for item in setting.items if item.role != BY):
            each = item.nbytes
            if item.key in parts and item.role != STATE:
                each = np.minimum(
                    each, each * setting.grid.parts(setting.model.homes[item.key].layouts) // devices
                )
            span = (0, self.ticks) if item.role == STATE else (item.start, item.stop)
            found.append(Term(item.node, None, *span, each))
        return found

    def _resolving(self) -> list[Term]:
        """Partial sums beside what they are reduced to."""
        local, found = Local(self.setting.grid), list[Term]()
        for step in self.setting.model.steps:
            for k, v in enumerate(step.equation.outputs):
                beside = step.ways.resolving[k]
                if beside.any():
                    size = self.setting.nbytes(self.setting.model.value((step.path, v)))
                    each = local(size, step.ways.made[k]) * beside
                    found.append(Term(step.node, None, step.tick, step.tick + 1, each))
        return found

    def _moved(self, sharing: bool) -> list[Term]:
        """Values held in a second layout.

        sharing: a copy that several readers share is held from the first to the last of them; that is likely,
        but not certain: they may want it in other layouts. Certain is that each has it while it runs.
        """
        model, local = self.setting.model, Local(self.setting.grid)
        ticks = {(step.path, step.index): step.tick for step in model.steps}
        copies = {read.target.node: read for read in model.reads if read.copy}
        spans: dict[int, list[int]] = {}
        done: set[tuple[Key, int]] = set()
        found: list[Term] = []

        def add(key: Key, source: Home, target: Home, start: int, stop: int) -> None:
            if source.node != target.node:
                each = local(self.setting.nbytes(model.value(key)), target.layouts)
                other = np.array([[x != y for y in target.layouts] for x in source.layouts])
                nbytes = np.where(other, each[None, :], 0)
                found.append(Term(source.node, target.node, start, stop, nbytes))

        for read in model.reads:
            tick = None if read.site is None else ticks.get(read.site[:2])
            if tick is None or read.tie or read.copy or read.lazy or read.key not in model.homes:
                continue
            if (read.key, tick) in done:
                continue
            done.add((read.key, tick))
            home = model.homes[read.key]
            if sharing and read.source.node in copies:
                spans.setdefault(read.source.node, []).append(tick)
                add(read.key, read.source, read.target, tick, tick + 1)
            else:
                add(read.key, home, read.target, tick, tick + 1)
        for node, when in spans.items():
            read = copies[node]
            add(read.key, read.source, read.target, min(when), max(when) + 1)
        return found


@dataclass
class Squeezed:
    """What has been found.

    Attributes:
        fastest: of the choices within the limit. leanest: of all.
        seconds: no plan within the limit takes less; infinite if none fits.
        least: bytes that every plan takes.
    """

    fastest: Seen | None = None
    leanest: Seen | None = None
    seconds: float = -math.inf
    least: float = 0.0


@dataclass
class Squeeze:
    """Looks for plans of one region within a limit.

    Attributes:
        moments: what is alive when. seen: what was looked at, under other limits too.
        limit: bytes. deadline: of `time.monotonic`. extra: seconds more, where nothing fits, to learn why.
    """

    moments: Moments
    seen: dict[Chosen, Seen]
    limit: int
    deadline: float
    extra: float
    found: Squeezed = field(default_factory=Squeezed)

    def run(self) -> Squeezed:
        """Returns what was found: with seconds in the price, and where nothing fits for bytes alone."""
        for seen in self.seen.values():
            self._judge(seen)
        nothing = np.zeros(self.moments.ticks)
        self._answer(nothing, 1.0)
        self._prove(nothing, 1.0)
        unit = min((s.seconds for s in self.seen.values()), default=0.0)
        if unit:
            self._generate(unit)
            if self.found.fastest is None:
                self.deadline += self.extra
                self._generate(0.0)
        return self.found

    # the mixture
    def _generate(self, unit: float) -> None:
        """Adds choices until the mixture is the best one. unit: of seconds; 0: only bytes count."""
        worth = 1.0 if unit else 0.0
        prices = np.zeros(self.moments.ticks)
        for _ in range(ROUNDS):
            prices, value = self._mix(unit)
            least = self._answer(prices, worth)
            if least is None or time.monotonic() > self.deadline:
                break
            if value - least < CLOSE * abs(value):
                break
        self._prove(prices, worth)

    def _mix(self, unit: float) -> tuple[Floats, float]:
        """Returns prices (seconds per byte and tick; shares, where only bytes count) and what the best
        mixture costs."""
        seen = list(self.seen.values())
        usage = np.array([s.usage for s in seen]).T / self.limit
        rows = np.flatnonzero(usage.max(axis=1) > (1.0 if unit else 0.0))
        rows = rows[_peaks(usage[rows])]
        over = np.full((len(rows), 1), -1.0)
        cost = np.array([s.seconds / unit if unit else 0.0 for s in seen] + [PENALTY if unit else 1.0])
        found = linprog(
            cost,
            A_ub=np.hstack([usage[rows], over]),
            b_ub=np.ones(len(rows)) if unit else np.zeros(len(rows)),
            A_eq=np.array([[1.0] * len(seen) + [0.0]]),
            b_eq=[1.0],
            bounds=(0, None),
            method="highs",
        )
        prices = np.zeros(self.moments.ticks)
        prices[rows] = np.maximum(0.0, -found.ineqlin.marginals)
        return prices * (unit / self.limit if unit else 1.0), float(found.fun) * (unit or self.limit)

    # one answer
    def _answer(self, prices: Floats, worth: float) -> float | None:
        """Adds the best choice at these prices; returns what no mixture takes less than, None if the choice
        is known."""
        moments = self.moments
        solved = minimise(moments.priced(prices, worth, moments.likely), None, ANSWER, CLOSE)
        if solved.chosen is None or solved.chosen in self.seen:
            return None
        self.seen[solved.chosen] = seen = moments.see(solved.chosen)
        self._judge(seen)
        return solved.bound - (float(prices.sum()) * self.limit if worth else 0.0)

    def _judge(self, seen: Seen) -> None:
        best, lean = self.found.fastest, self.found.leanest
        if seen.peak <= self.limit and (best is None or seen.seconds < best.seconds):
            self.found.fastest = seen
        if lean is None or seen.peak < lean.peak:
            self.found.leanest = seen

    def _prove(self, prices: Floats, worth: float) -> None:
        """Learns what these prices prove, of bytes that are certain."""
        moments = self.moments
        solved = minimise(moments.priced(prices, worth, moments.certain), None, ANSWER, CLOSE)
        total = float(prices.sum())
        if worth:
            self.found.seconds = max(self.found.seconds, solved.bound - total * self.limit)
        elif total > 0:
            self.found.least = max(self.found.least, solved.bound / total)
            if self.found.least > self.limit:
                self.found.seconds = math.inf


def _peaks(usage: Floats) -> npt.NDArray[np.int64]:
    """Returns the rows that no other row exceeds in every column: only moments that may be peaks."""
    keep: list[int] = []
    for i in np.argsort(-usage.sum(axis=1), kind="stable"):
        if not any((usage[k] >= usage[i]).all() for k in keep):
            keep.append(int(i))
    return np.array(sorted(keep), dtype=np.int64)


def moments_of(setting: Setting) -> Moments:
    """Returns what is alive when; made once for all limits."""
    if "moments" not in setting.known:
        setting.known["moments"] = Moments(setting)
    return setting.known["moments"]


def squeeze(setting: Setting, limit: int, seconds: float) -> Squeezed:
    """Returns the fastest plan found within `limit` bytes, the leanest, and what is proven.

    Args:
        seconds: to look for one, and once more to prove that there is none.
    """
    seen: dict[Chosen, Seen] = setting.known.setdefault("seen", {})
    deadline = time.monotonic() + seconds
    return Squeeze(moments_of(setting), seen, limit, deadline, seconds).run()


def remember(setting: Setting, chosen: Chosen) -> Seen:
    """Returns what a choice needs that was found elsewhere; later limits find it, too."""
    seen: dict[Chosen, Seen] = setting.known.setdefault("seen", {})
    if chosen not in seen:
        seen[chosen] = moments_of(setting).see(chosen)
    return seen[chosen]
