"""Layers of the backward's equations, and sums of gradients that belong to the apply phase."""

from __future__ import annotations

from autopar.core.graph import OpKind, Phase
from autopar.stages.draft import Draft, batch_of
from autopar.stages.forward import last_use


def backward_layers(draft: Draft) -> None:
    """Sets the layer of every backward equation that belongs to one.

    Cotangents go from later layers to earlier ones, and residuals are never sent back. So an equation lies
    at or before the layers of the cotangents it reads (`ceiling`), and at or after the layers of the
    residuals that it, or anything behind it, reads (`floor`). Between these two it takes its name's layer;
    without a name, the layer that used the same residuals and parameters in the forward; without those it
    stays with its producers.
    """
    backward = draft.of_phase(Phase.BACKWARD)
    floor = _floors(draft, backward)
    anchor = last_use(draft, Phase.FORWARD)
    for i in backward:
        ceiling = min(draft.layers_before(i, Phase.BACKWARD), default=None)
        at = draft.layer[i]
        if at is None:
            at = _anchored(draft, i, anchor)
        if at is None:
            at = ceiling
        if at is not None:
            at = max(at, floor.get(i, at))
            draft.layer[i] = at if ceiling is None else min(at, ceiling)


def _floors(draft: Draft, backward: list[int]) -> dict[int, int]:
    floor: dict[int, int] = {}
    for i in reversed(backward):
        own = draft.layers_before(i, Phase.FORWARD)
        behind = [floor[j] for j in draft.readers(i) if j in floor]
        if own or behind:
            floor[i] = max([*own, *behind])
    return floor


def _anchored(draft: Draft, i: int, last: dict[int, int]) -> int | None:
    """Returns the layer that used this equation's residuals and parameters in the forward, or None."""
    examples, found = batch_of(draft.graph), []
    for v in draft.graph.equations[i].operands:
        maker = draft.maker.get(v)
        if maker is None:
            if v not in examples and v in last and not draft.scalar(v):
                found.append(last[v])
        elif draft.phase[maker] is Phase.FORWARD:
            at = draft.layer[maker]
            if at is not None:
                found.append(max(at, last.get(v, at)))
            elif v in draft.state and v in last and not draft.scalar(v):
                found.append(last[v])
    return max(found, default=None)


def shared_sums(draft: Draft) -> None:
    """Moves sums of gradients from several layers, which nothing in the backward reads, into the apply phase.

    The gradient of a parameter that several layers use (a tied embedding) then crosses between stages once
    per step instead of once per micro-batch. Casts and reshapes of such a sum move with it. (Sums are
    linear, so adding after the micro-batches are combined is the same.)
    """
    tail = _tail(draft)
    for i in sorted(tail):
        moved = any(draft.phase[j] is Phase.APPLY for j in draft.makers(i))
        crosses = len(set(draft.layers_before(i, Phase.BACKWARD))) > 1 and _is_sum(draft, i)
        if moved or crosses:
            draft.phase[i], draft.layer[i] = Phase.APPLY, None


def _tail(draft: Draft) -> set[int]:
    """Returns the sums, casts and reshapes at the end of the backward."""
    tail: set[int] = set()
    for i in reversed(draft.of_phase(Phase.BACKWARD)):
        ends = all(draft.phase[j] is Phase.APPLY or j in tail for j in draft.readers(i))
        if ends and (_is_sum(draft, i) or draft.graph.equations[i].kind is OpKind.VIEW):
            tail.add(i)
    return tail


def _is_sum(draft: Draft, i: int) -> bool:
    """Returns whether an elementwise equation joins several cotangents of one shape; only sums do that."""
    equation, values = draft.graph.equations[i], draft.graph.values
    makers = [draft.maker.get(v) for v in equation.operands]
    cotangents = all(j is not None and draft.phase[j] is not Phase.FORWARD for j in makers)
    shapes = {values[v].shape for v in (*equation.operands, *equation.outputs)}
    elementwise = equation.kind is OpKind.FUSED and len(equation.outputs) == 1
    return elementwise and cotangents and len(equation.inputs) == len(makers) > 1 and len(shapes) == 1
