"""Memory that depends on two choices at once: values held in a second layout while somebody reads them so.

The integer program counts bytes per choice of one node, so it does not see these. They are counted for a plan
that has been found; if it then does not fit, it is looked for again below a lower limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from autopar.core.graph import Value
from autopar.sharding.copies import moved_for
from autopar.sharding.grid import Grid, Layout
from autopar.sharding.model import Home, Key, Model
from autopar.sharding.region import Region


class Held(NamedTuple):
    """Bytes alive in the half-open interval [start, stop) of ticks."""

    key: Key
    start: int
    stop: int
    nbytes: int


def second_layouts(
    region: Region,
    model: Model,
    grid: Grid,
    nbytes: Callable[[Value], int],
    chosen: Sequence[int],
    regather: bool,
) -> list[Held]:
    """Returns what a choice holds beside every value's own layout.

    A moved value lives from its first reader to its last in the same program. Partial sums exist beside
    what they are reduced to; where that is scattered, a compiler without reduce-scatter makes the whole
    sum first.
    """

    def at(home: Home) -> Layout:
        return home.layouts[chosen[home.node]]

    def size(key: Key, layout: Layout) -> int:
        return -(-nbytes(model.value(key)) // grid.shards(layout))

    ticks = {(step.path, step.index): step.tick for step in model.steps}
    spans: dict[tuple[Key, Layout, str], tuple[int, int]] = {}
    for read in model.reads:
        tick = None if read.site is None else ticks.get(read.site[:2])
        if tick is None or read.tie or read.copy or read.lazy or read.key not in model.homes:
            continue
        want = at(read.target)
        if want != at(model.homes[read.key]):
            group = read.key, want, moved_for(region, regather, read.key, read.phase)
            first, last = spans.get(group, (tick, tick))
            spans[group] = min(first, tick), max(last, tick)
    found = [Held(key, a, b + 1, size(key, layout)) for (key, layout, _), (a, b) in spans.items()]
    for step in model.steps:
        way = step.ways[chosen[step.node]]
        if not way.traffic:
            continue
        for v, made, times in zip(step.equation.outputs, way.made, way.resolving, strict=True):
            if times:
                key = step.path, v
                found.append(Held(key, step.tick, step.tick + 1, times * size(key, made)))
    return found
