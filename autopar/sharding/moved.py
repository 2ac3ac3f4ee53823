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
from autopar.sharding.model import Home, Key, Model, Step
from autopar.sharding.region import Region


class Held(NamedTuple):
    """Bytes alive in the half-open interval [start, stop) of ticks."""

    key: Key
    start: int
    stop: int
    nbytes: int


class Moves(NamedTuple):
    """What may be held in a second layout, depending on what is chosen.

    Attributes:
        reads: value, where it lies, how a reader wants it, the reader's tick, and who shares the move.
        sums: operations that may leave partial sums.
    """

    reads: tuple[tuple[Key, Home, Home, int, str], ...]
    sums: tuple[Step, ...]


def moves_of(region: Region, model: Model, regather: bool) -> Moves:
    """Returns the moves that a model knows of."""
    ticks = {(step.path, step.index): step.tick for step in model.steps}
    reads: list[tuple[Key, Home, Home, int, str]] = []
    for read in model.reads:
        tick = None if read.site is None else ticks.get(read.site[:2])
        if tick is None or read.tie or read.copy or read.lazy or read.key not in model.homes:
            continue
        group = moved_for(region, regather, read.key, read.phase)
        reads.append((read.key, model.homes[read.key], read.target, tick, group))
    sums = (step for step in model.steps if any(beside.any() for beside in step.ways.resolving))
    return Moves(tuple(reads), tuple(sums))


def second_layouts(
    moves: Moves, model: Model, grid: Grid, nbytes: Callable[[Value], int], chosen: Sequence[int]
) -> list[Held]:
    """Returns what a choice holds beside every value's own layout.

    A moved value lives from its first reader to its last in the same program. Partial sums exist beside
    what they are reduced to; where that is scattered, a compiler without reduce-scatter makes the whole
    sum first.
    """

    def size(key: Key, layout: Layout) -> int:
        return -(-nbytes(model.value(key)) // grid.shards(layout))

    spans: dict[tuple[Key, Layout, str], tuple[int, int]] = {}
    for key, home, target, tick, group in moves.reads:
        want = target.layouts[chosen[target.node]]
        if want != home.layouts[chosen[home.node]]:
            first, last = spans.get((key, want, group), (tick, tick))
            spans[key, want, group] = min(first, tick), max(last, tick)
    found = [Held(key, a, b + 1, size(key, layout)) for (key, layout, _), (a, b) in spans.items()]
    for step in moves.sums:
        way = step.ways[chosen[step.node]]
        if not way.traffic:
            continue
        for v, made, times in zip(step.equation.outputs, way.made, way.resolving, strict=True):
            if times:
                key = step.path, v
                found.append(Held(key, step.tick, step.tick + 1, times * size(key, made)))
    return found
