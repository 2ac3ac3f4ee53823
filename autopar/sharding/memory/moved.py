"""Memory that depends on two choices at once: values held in a second layout while somebody reads them so.

The integer program counts bytes per choice of one node, so it does not see these. They are counted for a plan
that has been found; if it then does not fit, it is looked for again below a lower limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from autopar.sharding.choices.copies import moved_for
from autopar.sharding.choices.model import Home, Key, Model, Path, Read, Site, Step
from autopar.sharding.region import Region
from autopar.sharding.ways.grid import Grid, Layout


class Held(NamedTuple):
    """Bytes alive in the half-open interval [start, stop) of ticks."""

    key: Key
    start: int
    stop: int
    nbytes: int


class Moves(NamedTuple):
    """What may be held in a second layout, depending on what is chosen.

    Attributes:
        reads: value, where it lies, how a reader wants it, from which tick to which, and who shares the move.
        sums: operations that may leave partial sums.
    """

    reads: tuple[tuple[Key, Home, Home, int, int, str], ...]
    sums: tuple[Step, ...]


def moved_reads(model: Model) -> Iterator[tuple[Read, tuple[int, int]]]:
    """Yields the reads for which a value may be held in a second layout, and its first and last tick."""
    spans = _spans(model)
    for read in model.reads:
        span = None if read.site is None else spans(read.site)
        if span is None or read.tie or read.copy or read.lazy or read.key not in model.homes:
            continue
        yield read, span


def moves_of(region: Region, model: Model, regather: bool) -> Moves:
    """Returns the moves that a model knows of."""
    reads: list[tuple[Key, Home, Home, int, int, str]] = []
    for read, span in moved_reads(model):
        group = moved_for(region, regather, read.key, read.phase)
        reads.append((read.key, model.homes[read.key], read.target, *span, group))
    sums = (step for step in model.steps if any(step.ways.sums))
    return Moves(tuple(reads), tuple(sums))


def _spans(model: Model) -> Callable[[Site], tuple[int, int] | None]:
    """Returns in which ticks, first and last, an operand is read: a loop reads its constants and what it
    slices as long as it runs, what it carries when it begins."""
    carries = {path: range(loop.consts, loop.consts + loop.carries) for path, loop in model.loops()}
    spans: dict[Path, tuple[int, int]] = {}
    for step in model.steps:
        place = *step.path, step.index
        for depth in range(1, len(place) + 1):
            first, last = spans.get(place[:depth], (step.tick, step.tick))
            spans[place[:depth]] = min(first, step.tick), max(last, step.tick)

    def of(site: Site) -> tuple[int, int] | None:
        path, index, operand = site
        span = spans.get((*path, index))
        begins = operand in carries.get((*path, index), ())
        return (span[0], span[0]) if span and begins else span

    return of


def second_layouts(moves: Moves, model: Model, grid: Grid, chosen: Sequence[int]) -> list[Held]:
    """Returns what a choice holds beside every value's own layout.

    A moved value lives from its first reader to its last in the same program. Partial sums exist beside
    what they are reduced to; where that is scattered, a compiler without reduce-scatter makes the whole
    sum first.
    """

    def size(key: Key, layout: Layout) -> int:
        return -(-model.nbytes(key) // grid.shards(layout))

    spans: dict[tuple[Key, Layout, str], tuple[int, int]] = {}
    for key, home, target, start, stop, group in moves.reads:
        want = target.layouts[chosen[target.node]]
        if want != home.layouts[chosen[home.node]]:
            first, last = spans.get((key, want, group), (start, stop))
            spans[key, want, group] = min(first, start), max(last, stop)
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
