"""Elementwise results that nobody reads whole: a compiler computes only the parts that are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from autopar.sharding.choices.model import Home, Key, Model
from autopar.sharding.memory.alive import BY, STATE, TURNED, Item
from autopar.sharding.memory.fusion import INSIDE
from autopar.sharding.memory.moved import Held
from autopar.sharding.ways.grid import Layout


class Divisible(NamedTuple):
    """An elementwise result in memory, where it lies, and where its readers want it."""

    item: Item
    home: Home
    wanted: tuple[Home, ...]


def divisible(model: Model, items: Sequence[Item]) -> list[Divisible]:
    """Returns what may take less, depending on what is chosen."""
    wanted: dict[Key, list[Home]] = {}
    for read in model.reads:
        if not read.copy:
            wanted.setdefault(read.key, []).append(read.target)
    elementwise = made_elementwise(model)
    found: list[Divisible] = []
    for item in items:
        home = model.homes.get(item.key)
        if item.role in (STATE, BY, TURNED) or item.key not in elementwise or item.key not in wanted:
            continue
        if home is not None and home.node == item.node:
            found.append(Divisible(item, home, tuple(wanted[item.key])))
    return found


def cut_at_once(candidates: Sequence[Divisible], chosen: Sequence[int]) -> list[Held]:
    """Returns, as negative bytes, what values do not take that nobody reads whole.

    An elementwise result of which all readers want a part is computed in that part only, which is counted as
    its second layout.
    """
    found: list[Held] = []
    for item, home, wanted in candidates:
        have = home.layouts[chosen[home.node]]
        wants = (target.layouts[chosen[target.node]] for target in wanted)
        if all(x != have and is_part(x, have) for x in wants) and item.nbytes[chosen[item.node]]:
            found.append(Held(item.key, item.start, item.stop, -int(item.nbytes[chosen[item.node]])))
    return found


def made_elementwise(model: Model) -> set[Key]:
    """Returns the results of elementwise equations."""
    steps = (step for step in model.steps if step.kind in INSIDE)
    return {(step.path, v) for step in steps for v in step.equation.outputs}


def is_part(layout: Layout, of: Layout) -> bool:
    """Returns whether a layout cuts every dim further than another one does, or as far."""
    return all(fine[: len(coarse)] == coarse for fine, coarse in zip(layout, of, strict=True))
