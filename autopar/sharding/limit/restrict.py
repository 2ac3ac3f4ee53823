"""One alternative per layer taken: a graph that holds several becomes the ordinary graph of those."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autopar.core.graph import Equation, Graph, OpKind, Remat


def choosing(graph: Graph) -> dict[str, tuple[Remat, ...]]:
    """Returns the alternatives of each layer that has several, in forward order."""
    found: dict[str, dict[Remat, None]] = {}
    for e in graph.equations:
        if e.when is not None:
            found.setdefault(e.when[0], {})[e.when[1]] = None
    return {name: tuple(each) for name, each in found.items()}


def restrict(graph: Graph, taken: Mapping[str, Remat]) -> Graph:
    """Returns the graph in which every layer takes one alternative; values keep their ids.

    Args:
        graph: holds alternatives. taken: one of them for each of `choosing(graph)`.
    """
    maker = graph.producers()
    same: dict[int, int] = {}

    def runs(e: Equation) -> bool:
        return e.when is None or taken[e.when[0]] is e.when[1]

    for e in graph.equations:
        if e.kind is OpKind.EITHER:
            same[e.outputs[0]] = next(v for v in e.operands if runs(graph.equations[maker[v]]))

    def now(v: int | None) -> int | None:
        return v if v is None else same.get(v, v)

    kept = [
        replace(e, inputs=tuple(map(now, e.inputs)), when=None)
        for e in graph.equations
        if runs(e) and e.kind is not OpKind.EITHER
    ]
    pairs = {same.get(v, v): how for v, how in graph.combine if same.get(v, v) in _made(kept)}
    return replace(
        graph,
        equations=tuple(kept),
        outputs=tuple(map(now, graph.outputs)),
        combine=tuple(pairs.items()),
        gradients=tuple((same.get(g, g), p) for g, p in graph.gradients),
    )


def _made(equations: list[Equation]) -> set[int]:
    return {v for e in equations for v in e.outputs}
