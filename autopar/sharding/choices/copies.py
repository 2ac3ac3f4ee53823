"""Copies: a value that several operations want in another layout is moved once.

Each (value, program) that more than one node reads gets a node of its own between them: the layout in which
it is offered to its readers. Within one compiled program the compiler merges equal moves, so forward and
backward share theirs, unless `Options.regather` asks for state to be moved for each of them: gathered weights
then are not held in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autopar.core.graph import Phase
from autopar.sharding.choices.holding import twins
from autopar.sharding.choices.model import Holding, Home, Key, Model, Read
from autopar.sharding.region import Region
from autopar.sharding.ways.grid import Grid
from autopar.sharding.ways.resharding import table_for


def moved_for(region: Region, regather: bool, key: Key, phase: Phase) -> str:
    """Returns what readers have in common that share the moves of a value."""
    apart = regather and phase is Phase.BACKWARD and not key[0] and key[1] in region.state
    return str(phase) if apart else region.program(phase)


def share_reads(model: Model, grid: Grid, region: Region, regather: bool) -> None:
    """Puts a copy node between every value and its readers, where it has several in a program, or where what
    the forward moved may be held for the backward (`choices/holding.py`)."""
    equal = twins(region, model)
    ahead = {*equal.values()}
    copies: dict[Key, Home] = {}
    groups: dict[tuple[Key, str, Home], list[int]] = {}
    for r, read in enumerate(model.reads):
        if not read.tie and read.source.node != read.target.node:
            group = moved_for(region, regather, read.key, read.phase)
            groups.setdefault((read.key, group, read.source), []).append(r)
    for (key, _, source), members in groups.items():
        first = copies.get(equal[key]) if key in equal else None
        several = len({model.reads[r].target.node for r in members}) > 1
        if several or key in ahead or first is not None:
            copies[key] = _offered(model, grid, source, members, first)
            if first is not None:
                _hold(model, key, equal[key], first, copies[key])


def _offered(model: Model, grid: Grid, source: Home, members: Sequence[int], first: Home | None) -> Home:
    """Adds a copy of a value for some of its reads. first: that of the forward, which may be held for it."""
    reads = [model.reads[r] for r in members]
    key, shape = reads[0].key, model.value(reads[0].key).shape
    layouts = table_for(shape, grid).layouts
    like = ("copy", shape) if first is None else ("held", shape)
    layouts = layouts if first is None else layouts + layouts
    offered = Home(model.node("copy", len(layouts), like, owner=model.owners.get(source.node)), layouts)
    for r, read in zip(members, reads, strict=True):
        model.reads[r] = replace(read, source=offered)
    times = max(read.times for read in reads)
    kernels = frozenset[int]().union(*(read.kernels for read in reads))
    held = None if first is None else False
    model.reads.append(
        Read(key, source, offered, reads[0].phase, times, copy=True, kernels=kernels, held=held)
    )
    return offered


def _hold(model: Model, key: Key, of: Key, first: Home, offered: Home) -> None:
    """Lets a copy take over what the forward moved to its own."""
    times, phase = model.reads[-1].times, model.reads[-1].phase
    model.reads.append(Read(of, first, offered, phase, times, copy=True, held=True))
    model.holdings.append(Holding(key, of, offered))
