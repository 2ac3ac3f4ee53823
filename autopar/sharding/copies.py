"""Copies: a value that several operations want in another layout is moved once.

Each (value, phase) that more than one node reads gets a node of its own between them: the layout in which it
is offered to its readers. Phases are apart because each is a compiled program, and because gathered weights
are better gathered again in the backward than held.
"""

from __future__ import annotations

from dataclasses import replace

from autopar.core.graph import Phase
from autopar.sharding.grid import Grid
from autopar.sharding.model import Home, Key, Model, Read
from autopar.sharding.resharding import table_for


def share_reads(model: Model, grid: Grid) -> None:
    """Puts a copy node between every value and its readers, where it has several in a phase."""
    groups: dict[tuple[Key, Phase, Home], list[int]] = {}
    for r, read in enumerate(model.reads):
        if not read.tie and read.source.node != read.target.node:
            groups.setdefault((read.key, read.phase, read.source), []).append(r)
    for (key, phase, source), members in groups.items():
        if len({model.reads[r].target.node for r in members}) < 2:
            continue
        layouts = table_for(model.value(key).shape, grid).layouts
        node = model.node("copy", len(layouts), ("copy", model.value(key).shape))
        offered = Home(node, layouts)
        times = max(model.reads[r].times for r in members)
        for r in members:
            model.reads[r] = replace(model.reads[r], source=offered)
        model.reads.append(Read(key, source, offered, phase, times, copy=True))
