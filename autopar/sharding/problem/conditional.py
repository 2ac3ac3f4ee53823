"""Costs of a graph with alternatives: each counts only where it is taken.

A node for every layer that chooses, and one more choice for every node that is part of an alternative:
absent, which costs nothing and takes no memory. Taking an alternative is the same as none of its nodes being
absent, so that a solution is a plan of exactly the graph in which the other alternatives are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from scipy.cluster.hierarchy import DisjointSet

from autopar.core.graph import Alternative
from autopar.sharding.choices.alternatives import layers
from autopar.sharding.choices.model import Model
from autopar.sharding.problem.assemble import Costs, Floats


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
