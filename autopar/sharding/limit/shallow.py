"""A graph with fewer of its like layers: what one of them costs can be told from a few as well as from many.

Two layers are alike when their equations agree one by one but for what they read from outside. Of a run of
like layers the first, the second and the last are kept: the last reads what the third would have read, and
who read the third's results reads the last's.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import replace

from autopar.core.graph import Equation, Graph

KEPT = 3
"""Layers kept of a run of like ones."""


def layer_kinds(graph: Graph) -> tuple[Hashable, ...]:
    """Returns a key per layer; layers that compute the same on the same shapes have equal ones."""
    parts: list[list[Hashable]] = [[] for _ in graph.layers]
    own: list[dict[int, int]] = [{} for _ in graph.layers]  # values made in a layer, numbered
    for e in graph.equations:
        if e.layer is None:
            continue
        number = own[e.layer]
        read = tuple(_shape(graph, v) if v not in number else number[v] for v in e.inputs if v is not None)
        for v in e.outputs:
            number[v] = len(number)
        made = tuple(_shape(graph, v) for v in e.outputs)
        when = e.when and e.when[1]
        parts[e.layer].append((e.op, id(e.rule), e.kind, e.flops, e.phase, e.costly, when, read, made))
    return tuple(map(tuple, parts))


def _shape(graph: Graph, v: int) -> Hashable:
    return graph.values[v].shape, graph.values[v].dtype


def shallow(graph: Graph, kinds: Sequence[Hashable]) -> Graph:
    """Returns the graph without the inner layers of every run of like ones; the graph itself where layers
    read more than what the one next to them made.

    Values and layers keep their numbers.

    Args:
        kinds: of its layers, see `layer_kinds`.
    """
    layers: list[list[Equation]] = [[] for _ in graph.layers]
    for e in graph.equations:
        if e.layer is not None:
            layers[e.layer].append(e)
    gone: set[int] = set()
    now: dict[int, int] = {}  # value that is gone → what stands for it
    for _, run in itertools.groupby(range(len(kinds)), key=lambda k: kinds[k]):
        members = list(run)
        if len(members) > KEPT:
            first, last = members[KEPT - 1], members[-1]
            gone.update(members[KEPT - 1 : -1])
            for a, b in zip(layers[first], layers[last], strict=True):
                now.update(zip(a.outputs, b.outputs, strict=True))
                now.update((v, u) for u, v in zip(a.operands, b.operands, strict=True) if u != v)
    made = {v for k in gone for e in layers[k] for v in e.outputs}
    standing = {v: u for v, u in now.items() if v in made}
    kept = [e for e in graph.equations if e.layer not in gone]
    lost = made - standing.keys()
    tensors = (v for e in kept for v in e.operands if graph.values[v].shape)
    if any(v in lost or standing.get(v) in made for v in tensors):
        return graph

    def present(v: int | None) -> int | None:
        return v if v is None else standing.get(v, v)

    return replace(
        graph,
        equations=tuple(replace(e, inputs=tuple(map(present, e.inputs))) for e in kept),
        outputs=tuple(None if v in made else v for v in graph.outputs),
        combine=tuple((v, how) for v, how in graph.combine if v not in made),
        gradients=tuple((g, p) for g, p in graph.gradients if g not in made),
    )
