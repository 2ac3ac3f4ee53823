"""All memory as that of single nodes: values held in a second layout get nodes of their own.

What a value takes in a second layout depends on two choices: where it lies, and how it is wanted. A node
that stands for both has a choice for every layout in which the value is wanted, once where it lies so already
and once where it has to be held beside; its two neighbours leave it no other. Programs grow by half of their
nodes; what they do not know is that readers of a shared copy may want it otherwise than it is offered, and
that of elementwise results perhaps only parts are computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autopar.sharding.choices.model import Home, Key
from autopar.sharding.limit.moments import Moments
from autopar.sharding.memory.alive import PASSING, Item, Local
from autopar.sharding.memory.moved import moved_reads
from autopar.sharding.problem.assemble import Costs, Floats


def explicit(moments: Moments) -> Costs:
    """Returns the costs of a region, with more nodes after its own: no limit is looked at yet."""
    return _Explicit(moments).costs()


@dataclass
class _Explicit:
    """Costs that grow. nodes, items: after the region's own. edges: all."""

    moments: Moments

    def __post_init__(self) -> None:
        base = self.moments.costs
        self._nodes, self._items, self._edges = [*base.nodes], [*base.items], dict(base.edges)
        self._local = Local(self.moments.setting.grid)

    def costs(self) -> Costs:
        base = self.moments.costs
        self._sums()
        self._moves()
        more = len(self._nodes) - len(base.nodes)
        likes = (*base.likes, *[None] * more)
        return Costs(tuple(self._nodes), self._edges, tuple(self._items), likes, tuple(range(len(likes))))

    def _size(self, key: Key) -> int:
        setting = self.moments.setting
        return setting.nbytes(setting.model.value(key))

    def _sums(self) -> None:
        """Partial sums beside what they are reduced to."""
        for step in self.moments.setting.model.steps:
            moves = np.array([bool(way.traffic) for way in step.ways])
            for k, v in enumerate(step.equation.outputs):
                beside, key = step.ways.resolving[k] * moves, (step.path, v)
                if beside.any():
                    each = self._local(self._size(key), step.ways.made[k]) * beside
                    self._items.append(Item(step.node, step.tick, step.tick + 1, each, PASSING, key))

    def _moves(self) -> None:
        """Values held in a second layout: from the first reader of a shared copy to the last, or for one."""
        model = self.moments.setting.model
        offered = {read.target.node: read.target for read in model.reads if read.copy}
        spans: dict[tuple[Key, int, int], tuple[Home, list[tuple[int, int]]]] = {}
        for read, (first, last) in moved_reads(model):
            target = offered.get(read.source.node, read.target)
            group = spans.setdefault((read.key, target.node, id(target.layouts)), (target, []))
            group[1].append((first, last + 1))
        for (key, node, _), (target, when) in spans.items():
            shared = node in offered
            once = [(min(a for a, _ in when), max(b for _, b in when))] if shared else sorted({*when})
            self._held(key, model.homes[key], target, once)

    def _held(self, key: Key, home: Home, target: Home, spans: list[tuple[int, int]]) -> None:
        """Adds what a value takes where it is wanted otherwise than it lies."""
        size = self._size(key)
        if home.node == target.node:
            other = np.array([x != y for x, y in zip(home.layouts, target.layouts)])
            self._add(home.node, self._local(size, target.layouts) * other, spans, key)
            return
        wanted = tuple(dict.fromkeys(target.layouts))
        count, node = len(wanted), len(self._nodes)
        as_wanted = np.array([[x == y for y in wanted] for x in target.layouts])
        lies_so = np.array([[x == y for y in wanted] for x in home.layouts])
        self._nodes.append(np.zeros(2 * count))
        self._edges[target.node, node] = _forbidden(~np.hstack([as_wanted, as_wanted]))
        self._edges[home.node, node] = _forbidden(np.hstack([~lies_so, lies_so]))
        held = self._local(size, wanted)
        self._add(node, np.concatenate([np.zeros_like(held), held]), spans, key)

    def _add(self, node: int, nbytes: np.ndarray, spans: list[tuple[int, int]], key: Key) -> None:
        if nbytes.any():
            self._items.extend(Item(node, a, b, nbytes, PASSING, key) for a, b in spans)


def _forbidden(where: np.ndarray) -> Floats:
    return np.where(where, np.inf, 0.0)
