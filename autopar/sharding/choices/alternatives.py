"""Alternatives in the choice model: equations of which only those run whose alternative is taken.

An alternative reads what others make from homes of its own, which have to agree with the value's; what
follows such an operand is then part of the alternative, too. What alternatives make in one place has one
home, with which the maker's has to agree. What that means for costs is in `problem/conditional.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopar.core.graph import Equation, Remat
from autopar.sharding.choices.model import Key, Model, Scope

if TYPE_CHECKING:
    from autopar.sharding.choices.build import Builder


def add(builder: Builder, scope: Scope, i: int, e: Equation) -> None:
    """Adds an equation of an alternative to a model, with the bodies of its loops."""
    model, start = builder.model, builder.model.ticks
    assert e.when is not None and not scope.path, "alternatives are those of layers"
    keys: list[Key] = [((), v) for v in dict.fromkeys(e.operands)]
    outside = {k: model.homes[k] for k in keys if k in model.homes and model.owner(k) != e.when}
    entries = {key: model.entry(key, e.when) for key in outside}
    model.homes.update(entries)
    model.now = e.when
    builder.equation(scope, i, e)
    model.now = None
    model.homes.update(outside)
    model.asked.update(dict.fromkeys(range(start, model.ticks + 1), e.when))


def join(builder: Builder, scope: Scope, e: Equation) -> None:
    """Adds the value that is one of several alternatives'."""
    model = builder.model
    key: Key = scope.path, e.outputs[0]
    if not builder.rank(scope, e.outputs[0]):
        return
    builder.free(key, "either")
    model.first[key] = model.ticks + 1  # until then it is the alternative's own
    for v in e.operands:
        made: Key = scope.path, v
        if made in model.lazy:
            maker = scope.equations[model.lazy[made].index]
            model.now = maker.when
            builder.materialize(made, maker.phase)
            model.now = None
        model.same.append((model.homes[made], model.homes[key]))
        model.uses.setdefault(made, []).append((model.ticks, e.phase))


def layers(model: Model) -> dict[str, tuple[Remat, ...]]:
    """Returns the alternatives of each layer that has several, in order of appearance."""
    found: dict[str, dict[Remat, None]] = {}
    for name, remat in model.asked.values():
        found.setdefault(name, {})[remat] = None
    return {name: tuple(each) for name, each in found.items()}
