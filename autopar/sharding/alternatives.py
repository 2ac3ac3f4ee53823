"""Alternatives in the choice model: equations of which only those run whose alternative is taken.

An alternative reads what others make from homes of its own, which have to agree with the value's; what
follows such an operand is then part of the alternative, too. What alternatives make in one place has one
home, with which the maker's has to agree.

`conditional` completes the costs: a node for every layer that chooses, and one more choice for every node
that is part of an alternative: absent, which costs nothing, takes no memory, and agrees with everything.
Taking an alternative is the same as none of its nodes being absent, so that a solution is a plan of exactly
the graph in which the other alternatives are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from autopar.core.graph import Equation, Remat
from autopar.sharding.assemble import Costs, Floats
from autopar.sharding.memory import Item
from autopar.sharding.model import Key, Model, Scope

if TYPE_CHECKING:
    from autopar.sharding.build import Builder


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


def conditional(costs: Costs, model: Model, group: Mapping[str, int]) -> Costs:
    """Returns the costs with a node per layer that chooses: the last ones, in the order of `layers`.

    Args:
        costs: of all alternatives as if each ran.
        group: layer → number; only layers of one group may be merged by `share`.
    """
    count = len(costs.nodes)
    choosing = layers(model)
    number = {name: count + k for k, name in enumerate(choosing)}
    optional = set(model.owners)
    nodes = [np.append(c, 0.0) if i in optional else c for i, c in enumerate(costs.nodes)]
    nodes += [np.zeros(len(remats)) for remats in choosing.values()]
    edges = {pair: _padded(matrix, pair, optional) for pair, matrix in costs.edges.items()}

    def join_nodes(a: int, b: int, matrix: Floats) -> None:
        pair, matrix = ((a, b), matrix) if a < b else ((b, a), matrix.T)
        edges[pair] = edges[pair] + matrix if pair in edges else matrix

    for x, y in model.same:
        agree = np.array([[0.0 if p == q else np.inf for q in y.layouts] for p in x.layouts])
        join_nodes(x.node, y.node, _padded(agree, (x.node, y.node), optional))
    for node, (name, remat) in model.owners.items():
        taken = np.array([[other == remat] for other in choosing[name]])
        present = np.arange(len(nodes[node]))[None, :] < len(nodes[node]) - 1
        join_nodes(number[name], node, np.where(taken == present, 0.0, np.inf))
    items = tuple(_item(item, optional) for item in costs.items)
    likes = (*costs.likes, *(("layer", remats, group.get(name, 0)) for name, remats in choosing.items()))
    return Costs(tuple(nodes), edges, items, likes, tuple(range(len(nodes))))


def _padded(matrix: Floats, pair: tuple[int, int], optional: set[int]) -> Floats:
    extra = [(0, int(end in optional)) for end in pair]
    return np.pad(matrix, extra) if any(n for _, n in extra) else matrix


def _item(item: Item, optional: set[int]) -> Item:
    return replace(item, nbytes=np.append(item.nbytes, 0)) if item.node in optional else item
