"""What is alive on one device at every moment, for every choice of layouts.

Bytes depend on the choices of single nodes (a value in its own layout, sums on their way) and on pairs of
them (a value held in a second layout for its readers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from autopar.sharding.choices.model import Home, Key
from autopar.sharding.memory.alive import BY, STATE, Item, Local
from autopar.sharding.memory.moved import moved_reads
from autopar.sharding.memory.parts import Divisible, divisible, is_part
from autopar.sharding.problem.assemble import Costs, assemble
from autopar.sharding.ways.grid import Layout

if TYPE_CHECKING:
    from autopar.sharding.problem.setting import Setting

Chosen: TypeAlias = tuple[int, ...]
Floats: TypeAlias = npt.NDArray[np.float64]


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
        ticks: how many there are. costs: seconds, and the bytes of single choices.
        whole: of these, what is certain to be there as a whole.
        likely: bytes, as far as single choices and pairs of them say.
    """

    def __init__(self, setting: Setting):
        self.setting = setting
        self._items = tuple(item for item in setting.items if item.role != BY)
        self.costs = assemble(setting.model, setting.grid, setting.nbytes, self._items, 0.0)
        self.ticks = 1 + max((item.stop for item in self._items), default=0)
        self._divisible = {id(d.item): d for d in divisible(setting.model, self._items)}
        self._cut: dict[tuple[int, int], npt.NDArray[np.bool_]] = {}
        resolving = self._resolving()
        self.likely = [*map(self._alive, self._items), *resolving, *self._moved(sharing=True)]
        self.whole = tuple(item for item in self._items if id(item) not in self._divisible)
        self._certain = [*map(self._alive, self.whole), *resolving, *self._moved(sharing=False)]

    def see(self, chosen: Chosen) -> Seen:
        """Returns what a choice needs."""
        peak = self.setting.memory(chosen).peak
        return Seen(chosen, self._seconds(chosen), self.usage(chosen, self.likely), peak)

    def certain(self, near: Chosen) -> list[Term]:
        """Returns bytes that no choice does without.

        Left out is that readers of a shared copy may do without it, and that of an elementwise result perhaps
        only parts are computed: it is there as a whole if one of its readers wants no part. Which reader is
        asked is free.

        Args:
            near: a choice; the readers asked are those that say most there.
        """
        return [*self._certain, *(self._whole(d, near) for d in self._divisible.values())]

    def priced(
        self,
        prices: Floats,
        worth: float,
        terms: Sequence[Term],
        barred: dict[int, npt.NDArray[np.bool_]] | None = None,
    ) -> Costs:
        """Returns the costs at prices per byte and tick. worth: of a second. barred: node → choices that may
        not be taken."""
        passed = np.concatenate([[0.0], np.cumsum(prices)])
        nodes = [_scaled(c, worth) for c in self.costs.nodes]
        edges = {k: _scaled(m, worth) for k, m in self.costs.edges.items()}
        for node, wrong in (barred or {}).items():
            nodes[node][wrong] = np.inf
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

    def timelines(self, chosen: Chosen) -> tuple[Floats, Floats]:
        """Returns the bytes at every tick that a choice really takes: of single choices, and beside them."""
        found = [np.zeros(self.ticks + 2) for _ in range(2)]
        single = ((item.start, item.stop, item.nbytes[chosen[item.node]]) for item in self._items)
        beside = ((held.start, held.stop, held.nbytes) for held in self.setting.held(chosen))
        for steps, each in zip(found, (single, beside), strict=True):
            for start, stop, nbytes in each:
                steps[min(start, self.ticks)] += nbytes
                steps[min(stop, self.ticks + 1)] -= nbytes
        return np.cumsum(found[0])[:-1], np.cumsum(found[1])[:-1]

    # what is alive
    def _span(self, item: Item) -> tuple[int, int]:
        """When an item is alive; state is there from the beginning to the end."""
        return (0, self.ticks) if item.role == STATE else (item.start, item.stop)

    def _alive(self, item: Item) -> Term:
        """A value in its own layout."""
        return Term(item.node, None, *self._span(item), item.nbytes)

    def _whole(self, found: Divisible, near: Chosen) -> Term:
        """An elementwise result where it is certain that all of it is there, as far as one reader says."""
        item, home = found.item, found.home

        def says(target: Home) -> tuple[bool, bool]:
            pair = min(item.node, target.node), max(item.node, target.node)
            cut = self._parts(home, target)[near[item.node], near[target.node]]
            return not cut, item.node == target.node or pair in self.costs.edges

        target = max(found.wanted, key=says)
        nbytes = np.where(self._parts(home, target), 0, item.nbytes[:, None])
        if target.node == item.node:
            return Term(item.node, None, *self._span(item), np.diagonal(nbytes))
        return Term(item.node, target.node, *self._span(item), nbytes)

    def _parts(self, home: Home, target: Home) -> npt.NDArray[np.bool_]:
        """Returns for every pair of choices whether a reader wants only a part of a value."""
        key = id(home.layouts), id(target.layouts)
        if key not in self._cut:

            def cut(fine: Layout, coarse: Layout) -> bool:
                return fine != coarse and is_part(fine, coarse)

            self._cut[key] = np.array([[cut(y, x) for y in target.layouts] for x in home.layouts])
        return self._cut[key]

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
        copies = {read.target.node: read for read in model.reads if read.copy and not read.held}
        spans: dict[int, list[int]] = {}
        done: set[tuple[Key, int]] = set()
        found: list[Term] = []

        def add(key: Key, source: Home, target: Home, start: int, stop: int) -> None:
            if source.node != target.node:
                each = local(self.setting.nbytes(model.value(key)), target.layouts)
                other = np.array([[x != y for y in target.layouts] for x in source.layouts])
                nbytes = np.where(other, each[None, :], 0)
                found.append(Term(source.node, target.node, start, stop, nbytes))

        for read, (first, last) in moved_reads(model):
            if (read.key, first) in done:
                continue
            done.add((read.key, first))
            home = model.homes[read.key]
            if sharing and read.source.node in copies:
                spans.setdefault(read.source.node, []).extend((first, last))
                add(read.key, read.source, read.target, first, last + 1)
            else:
                add(read.key, home, read.target, first, last + 1)
        for node, when in spans.items():
            read = copies[node]
            add(read.key, read.source, read.target, min(when), max(when) + 1)
        return found


def _scaled(seconds: Floats, worth: float) -> Floats:
    """Returns seconds times their worth; what may not be taken stays so, whatever seconds are worth."""
    return np.multiply(seconds, worth, out=np.full_like(seconds, np.inf), where=np.isfinite(seconds))


def moments_of(setting: Setting) -> Moments:
    """Returns what is alive when; made once for all limits."""
    if "moments" not in setting.known:
        setting.known["moments"] = Moments(setting)
    return setting.known["moments"]


def known_of(setting: Setting) -> dict[Chosen, Seen]:
    """Returns the choices looked at, under any limit."""
    return setting.known.setdefault("seen", {})


def remember(setting: Setting, chosen: Chosen) -> Seen:
    """Returns what a choice needs that was found elsewhere; later limits find it, too."""
    seen = known_of(setting)
    if chosen not in seen:
        seen[chosen] = moments_of(setting).see(chosen)
    return seen[chosen]
