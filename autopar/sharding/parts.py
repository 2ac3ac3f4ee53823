"""Elementwise results that nobody reads whole: a compiler computes only the parts that are read."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.sharding.fusion import INSIDE
from autopar.sharding.grid import Layout
from autopar.sharding.memory import BY, STATE, Item
from autopar.sharding.model import Key, Model
from autopar.sharding.moved import Held
from autopar.sharding.strategies import kind_of


def cut_at_once(model: Model, chosen: Sequence[int], items: Sequence[Item]) -> list[Held]:
    """Returns, as negative bytes, what values do not take that nobody reads whole.

    An elementwise result of which all readers want a part is computed in that part only, which is counted as
    its second layout.
    """
    wanted: dict[Key, set[Layout]] = {}
    for read in model.reads:
        if not read.copy:
            wanted.setdefault(read.key, set()).add(read.target.layouts[chosen[read.target.node]])
    elementwise = made_elementwise(model)
    found: list[Held] = []
    for item in items:
        home = model.homes.get(item.key)
        if item.role in (STATE, BY) or item.key not in elementwise:
            continue
        if home is None or home.node != item.node:
            continue
        have, wants = home.layouts[chosen[home.node]], wanted.get(item.key, set())
        size = int(item.nbytes[chosen[item.node]])
        if size and wants and all(x != have and _is_part(x, have) for x in wants):
            found.append(Held(item.key, item.start, item.stop, -size))
    return found


def made_elementwise(model: Model) -> set[Key]:
    """Returns the results of elementwise equations."""
    steps = (step for step in model.steps if kind_of(step.equation) in INSIDE)
    return {(step.path, v) for step in steps for v in step.equation.outputs}


def _is_part(layout: Layout, of: Layout) -> bool:
    """Whether a layout cuts every dim further than another one does, or as far."""
    return all(fine[: len(coarse)] == coarse for fine, coarse in zip(layout, of, strict=True))
