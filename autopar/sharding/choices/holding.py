"""Held copies: what is computed again of state alone need not be moved again.

A layer that computes its forward again casts its weights again, too, and moves the casts to where its
products read them: weights cut over a slow network are gathered for the forward and once more for the
backward. Holding what the forward gathered takes its bytes from the one to the other, and saves the second
gather. Which is better depends on the price of memory, so every such weight chooses: the copy that is offered
to the readers of the backward has each layout twice, moved anew or held.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from autopar.core.graph import Equation, OpKind, Phase
from autopar.sharding.choices.model import Key, Model
from autopar.sharding.region import Region

BARRIERS = ("optimization_barrier",)
"""Operations whose results are their operands: they only keep a compiler from merging what is computed again
with what it equals."""


def twins(region: Region, model: Model) -> dict[Key, Key]:
    """Returns value of the backward that is computed again → the equal one of the forward, both made of one
    state by casts alone; as far as it is known of each of their readers how it wants them."""
    if not region.whole:
        return {}
    origin: dict[int, tuple[Hashable, ...]] = {v: (v,) for v in region.state}
    ahead: dict[Hashable, int] = {(v,): v for v in region.state}
    found: dict[Key, Key] = {}
    for e in region.equations:
        if e.phase is Phase.APPLY or not _casts(region, e) or e.operands[0] not in origin:
            continue
        v = e.outputs[0]
        origin[v] = origin[e.operands[0]]
        if e.op not in BARRIERS:
            origin[v] = *origin[v], (e.op, region.values[v].dtype)
        if e.phase is Phase.FORWARD:
            ahead.setdefault(origin[v], v)
        elif origin[v] in ahead:
            found[(), v] = (), ahead[origin[v]]
    told = _told(model)
    return {
        key: of
        for key, of in found.items()
        if told(key, Phase.BACKWARD)
        and told(of, Phase.FORWARD)
        and model.homes.get(key) == model.homes.get(of) is not None
    }


def _casts(region: Region, e: Equation) -> bool:
    """Whether an equation changes nothing of a tensor but its element type, if that."""
    if e.kind is not OpKind.VIEW or e.when is not None or not len(e.inputs) == len(e.outputs) == 1:
        return False
    if None in e.inputs or e.rule is None or e.rule.operands[0] != e.rule.results[0]:
        return False
    before, after = region.values[e.operands[0]], region.values[e.outputs[0]]
    return e.op in BARRIERS or before.dtype != after.dtype


def _told(model: Model) -> Callable[[Key, Phase], bool]:
    """Returns whether a value is read in no phase but one, and by none but operations of the region itself
    that read what has been written."""
    phases: dict[Key, set[Phase | None]] = {}
    for read in model.reads:
        if not read.tie and read.source.node != read.target.node:
            plain = (
                not (read.lazy or read.copy or read.kernels) and read.site is not None and not read.site[0]
            )
            phases.setdefault(read.key, set()).add(read.phase if plain else None)
    return lambda key, phase: phases.get(key) == {phase}
