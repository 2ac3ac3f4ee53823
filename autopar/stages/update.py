"""Layers of the apply phase: parameters live in their first layer, optimizer state and update with them."""

from __future__ import annotations

from scipy.cluster.hierarchy import DisjointSet

from autopar.core.graph import OpKind, Phase
from autopar.stages.draft import Draft, batch_of
from autopar.stages.forward import first_use

ROUNDS = 8
"""Passes over the apply phase; each carries homes one step further along aliases. Two do in practice."""


def apply_layers(draft: Draft) -> None:
    """Sets the layer of every apply equation that belongs to one.

    Tensors decide, scalars do not: the update of a parameter that is scaled by a global norm stays with the
    parameter. What remains None is computed from nothing layered (a counter, a learning rate), or is a scalar
    that mixes layers (a global norm, whether all gradients are finite): `cut` computes that on one stage.
    """
    examples = batch_of(draft.graph)
    uses = first_use(draft, Phase.FORWARD, Phase.BACKWARD)
    held = {*draft.graph.inputs, *draft.graph.constants} - examples
    home = {v: k for v, k in uses.items() if v in held and not draft.scalar(v)}
    named = {i for i in draft.of_phase(Phase.APPLY) if draft.layer[i] is not None}
    update = [
        i for i in draft.of_phase(Phase.APPLY) if i not in named and draft.big(i) and _elementwise(draft, i)
    ]
    parts = _joined(draft, update)
    for _ in range(ROUNDS):
        before = list(draft.layer), dict(home)
        _from_operands(draft, home, named)
        _with_parameter(draft, home, update, parts)
        _house(draft, home, held)
        if before == (draft.layer, home):
            break


def _layers_of(draft: Draft, i: int, home: dict[int, int], scalars: bool) -> set[int]:
    """Returns the layers of the scalars read, or of the other values."""
    found: set[int] = set()
    for v in draft.graph.equations[i].operands:
        if draft.scalars[v] is scalars:
            maker = draft.maker.get(v)
            at = home.get(v) if maker is None else draft.layer[maker]
            if at is not None:
                found.add(at)
    return found


def _mixed(draft: Draft, i: int) -> bool:
    """Returns whether an equation reads a scalar that mixes layers."""
    makers = (draft.maker.get(v) for v in draft.graph.equations[i].operands if draft.scalar(v))
    return any(m is not None and draft.layer[m] is None and _reads_layers(draft, m) for m in makers)


def _reads_layers(draft: Draft, i: int) -> bool:
    """Returns whether an equation without a layer depends on layered ones: it is global rather than free."""
    todo, seen = [i], {i}
    while todo:
        for j in draft.makers(todo.pop()):
            if draft.layer[j] is not None:
                return True
            if j not in seen:
                seen.add(j)
                todo.append(j)
    return False


def _from_operands(draft: Draft, home: dict[int, int], named: set[int]) -> None:
    for i in draft.of_phase(Phase.APPLY):
        if i in named:
            continue
        if tensors := _layers_of(draft, i, home, scalars=False):
            draft.layer[i] = min(tensors)
        elif not draft.big(i):
            scalars = _layers_of(draft, i, home, scalars=True)
            draft.layer[i] = scalars.pop() if len(scalars) == 1 and not _mixed(draft, i) else None


def _joined(draft: Draft, update: list[int]) -> DisjointSet:
    """Returns the tensors that elementwise equations of one shape join."""
    parts = DisjointSet()
    for i in update:
        equation = draft.graph.equations[i]
        tensors = [v for v in (*equation.outputs, *equation.operands) if not draft.scalar(v)]
        for v in tensors:
            parts.add(v)
            parts.merge(v, tensors[0])
    return parts


def _with_parameter(draft: Draft, home: dict[int, int], update: list[int], parts: DisjointSet) -> None:
    """Gives every elementwise part of an update the layer of the parameter it updates.

    Values that elementwise equations of one shape join belong together. Without this, what is done to a
    gradient that was made in another layer than the parameter's first (a bias added at a boundary) would stay
    there.
    """
    first: dict[int, int] = {}
    for v in parts:
        if v in home:
            root = parts[v]
            first[root] = min(home[v], first.get(root, home[v]))
    for i in update:
        draft.layer[i] = first.get(parts[draft.graph.equations[i].outputs[0]], draft.layer[i])


def _elementwise(draft: Draft, i: int) -> bool:
    equation, values = draft.graph.equations[i], draft.graph.values
    if equation.kind not in (OpKind.FUSED, OpKind.VIEW) or len(equation.outputs) != 1:
        return False
    tensors = [values[v].shape for v in (*equation.outputs, *equation.operands) if not draft.scalar(v)]
    return len(set(tensors)) == 1


def _house(draft: Draft, home: dict[int, int], held: set[int]) -> None:
    """Gives a home to optimizer state: that of the equation that reads it, or that makes its next value."""
    graph = draft.graph
    for i in draft.of_phase(Phase.APPLY):
        at = draft.layer[i]
        for v in graph.equations[i].operands:
            if at is not None and v in held and v not in home and not draft.scalar(v):
                home[v] = at
    for o, position in graph.aliases:
        v, new = graph.inputs[position], graph.outputs[o]
        maker = draft.maker.get(new) if new is not None else None
        at = draft.layer[maker] if maker is not None else None
        if at is not None and v not in home and not draft.scalar(v):
            home[v] = at
