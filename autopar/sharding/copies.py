"""Copies: a value that several operations want in another layout is moved once.

Each (value, program) that more than one node reads gets a node of its own between them: the layout in which
it is offered to its readers. Within one compiled program the compiler merges equal moves, so forward and
backward share theirs, unless `Options.regather` asks for state to be moved for each of them: gathered weights
then are not held in between.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.core.graph import Phase
from autopar.sharding.grid import Grid
from autopar.sharding.model import Home, Key, Model, Read
from autopar.sharding.region import Region
from autopar.sharding.resharding import table_for


def moved_for(region: Region, regather: bool, key: Key, phase: Phase) -> str:
    """Returns what readers have in common that share the moves of a value."""
    apart = regather and phase is Phase.BACKWARD and not key[0] and key[1] in region.state
    return str(phase) if apart else region.program(phase)


def share_reads(model: Model, grid: Grid, region: Region, regather: bool) -> None:
    """Puts a copy node between every value and its readers, where it has several in a program."""
    groups: dict[tuple[Key, str, Home], list[int]] = {}
    for r, read in enumerate(model.reads):
        if not read.tie and read.source.node != read.target.node:
            group = moved_for(region, regather, read.key, read.phase)
            groups.setdefault((read.key, group, read.source), []).append(r)
    for (key, _, source), members in groups.items():
        phase = model.reads[members[0]].phase
        if len({model.reads[r].target.node for r in members}) < 2:
            continue
        layouts = table_for(model.value(key).shape, grid).layouts
        owner = model.owners.get(source.node)
        node = model.node("copy", len(layouts), ("copy", model.value(key).shape), owner=owner)
        offered = Home(node, layouts)
        times = max(model.reads[r].times for r in members)
        for r in members:
            model.reads[r] = replace(model.reads[r], source=offered)
        kernels = frozenset[int]().union(*(model.reads[r].kernels for r in members))
        model.reads.append(Read(key, source, offered, phase, times, copy=True, kernels=kernels))
