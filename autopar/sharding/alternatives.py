"""Alternatives in the choice model: equations of which only those run whose alternative is taken.

An alternative reads what others make from homes of its own, which have to agree with the value's; what
follows such an operand is then part of the alternative, too. What alternatives make in one place has one
home, with which the maker's has to agree.

`conditional` completes the costs: a node for every layer that chooses, and one more choice for every node
that is part of an alternative: absent, which costs nothing and takes no memory. Taking an alternative is the
same as none of its nodes being absent, so that a solution is a plan of exactly the graph in which the other
alternatives are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.cluster.hierarchy import DisjointSet

from autopar.core.graph import Alternative, Equation, Remat
from autopar.sharding.assemble import Costs, Floats
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


def conditional(costs: Costs, model: Model) -> Costs:
    """Returns the costs, each alternative's only where it is taken.

    One more node per layer chooses: they are the last ones, in the order of `layers`. Nodes of an alternative
    that share an edge agree on being absent there; one of each connected part agrees with the layer's node.

    Args:
        costs: of all alternatives as if each ran.
    """
    choosing, owners = layers(model), model.owners
    number = {name: len(costs.nodes) + k for k, name in enumerate(choosing)}
    nodes = [np.append(c, 0.0) if i in owners else c for i, c in enumerate(costs.nodes)]
    nodes += [np.zeros(len(remats)) for remats in choosing.values()]
    edges = {pair: _padded(matrix, pair, owners) for pair, matrix in costs.edges.items()}

    def add_edge(a: int, b: int, matrix: Floats) -> None:
        pair, matrix = ((a, b), matrix) if a < b else ((b, a), matrix.T)
        edges[pair] = edges[pair] + matrix if pair in edges else matrix

    for x, y in model.same:
        agree = np.array([[0.0 if p == q else np.inf for q in y.layouts] for p in x.layouts])
        add_edge(x.node, y.node, _padded(agree, (x.node, y.node), owners))
    parts = DisjointSet(owners)
    for a, b in edges:
        if a in owners and owners[a] == owners.get(b):
            parts.merge(a, b)
    for node in {parts[node] for node in owners}:
        name, remat = owners[node]
        taken = np.array([[other == remat] for other in choosing[name]])
        present = np.arange(len(nodes[node]))[None, :] < len(nodes[node]) - 1
        add_edge(number[name], node, np.where(taken == present, 0.0, np.inf))
    items = tuple(
        replace(item, nbytes=np.append(item.nbytes, 0)) if item.node in owners else item
        for item in costs.items
    )
    likes = (*costs.likes, *(("layer", remats) for remats in choosing.values()))
    return Costs(tuple(nodes), edges, items, likes, tuple(range(len(nodes))))


def _padded(matrix: Floats, pair: tuple[int, int], owners: Mapping[int, Alternative]) -> Floats:
    """Returns an edge's costs with a last choice, absent, for each end that is part of an alternative."""
    extra = [(0, int(end in owners)) for end in pair]
    together = pair[0] in owners and owners[pair[0]] == owners.get(pair[1])
    padded = np.pad(matrix, extra, constant_values=np.inf if together else 0.0)
    if together:
        padded[-1, -1] = 0.0
    return padded
