"""Layers of the forward's equations: names first, dataflow for the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

from autopar.core.dtypes import is_inexact
from autopar.core.graph import OpKind, Phase
from autopar.stages.draft import Draft

HEAVY = (OpKind.CONTRACTION, OpKind.LOOP)
"""Kinds too dear to be computed again wherever they are used, if the result is larger than `SMALL`."""

SMALL = 64
"""Elements; random keys are made by loops, but are small and wanted by every layer."""

END = "end"
"""The layer of what follows the last named one, where it is made one."""


def forward_layers(draft: Draft) -> None:
    """Sets the layer of every forward equation that belongs to one; what depends on no layer stays None.

    After a layered producer: the latest one's layer (and a named equation never comes before what it reads).
    Before the first layer: examples that meet parameters (an embedding) and anything heavy go to their first
    consumer. Reductions of parameters to a scalar (weight decay inside the loss) live with their parameter.
    """
    forward = draft.of_phase(Phase.FORWARD)
    _after_producers(draft, forward)
    for i in reversed(forward):
        if draft.layer[i] is None and is_real(draft, i):
            after = [draft.layer[j] for j in draft.readers(i) if draft.phase[j] is Phase.FORWARD]
            draft.layer[i] = min((k for k in after if k is not None), default=None)
    _parameter_scalars(draft, forward)
    _after_producers(draft, forward)


def end_apart(draft: Draft, named: Collection[int]) -> None:
    """Makes what follows the last layer one of its own, if its tensors are larger than what it reads of it (a
    head over a vocabulary): then it is computed, and differentiated, while nothing of that layer is alive.

    Args:
        draft: of a forward, its layers set. named: the equations whose layers names gave.
    """
    graph, last = draft.graph, len(draft.graph.layers) - 1
    if not named or END in graph.layers or any(phase is not Phase.FORWARD for phase in draft.phase):
        return
    needed: set[int] = set()
    for i in reversed(range(len(graph.equations))):
        if i in named or not needed.isdisjoint(graph.equations[i].outputs):
            needed.update(graph.equations[i].operands)
    after = [
        i
        for i, e in enumerate(graph.equations)
        if draft.layer[i] == last and i not in named and needed.isdisjoint(e.outputs)
    ]
    made = {v for i in after for v in graph.equations[i].outputs if v in draft.mixes}
    read = {v for i in after for v in graph.equations[i].operands if v in draft.mixes} - made
    if max((graph.values[v].nbytes for v in made), default=0) > max(
        (graph.values[v].nbytes for v in read), default=0
    ):
        draft.graph = replace(graph, layers=(*graph.layers, END))
        draft.layer = [last + 1 if i in {*after} else k for i, k in enumerate(draft.layer)]


def _after_producers(draft: Draft, forward: list[int]) -> None:
    for i in forward:
        before = draft.layers_before(i, Phase.FORWARD)
        if before:
            draft.layer[i] = max([*before, draft.layer[i] or 0])


def is_real(draft: Draft, i: int) -> bool:
    """Returns whether the equation is worth computing once only: examples × parameters, or heavy."""
    equation = draft.graph.equations[i]
    large = any(draft.graph.values[v].size > SMALL for v in equation.outputs)
    return any(v in draft.mixes for v in equation.outputs) or (equation.kind in HEAVY and large)


def _parameter_scalars(draft: Draft, forward: list[int]) -> None:
    home = {v: k for v, k in first_use(draft, Phase.FORWARD).items() if v not in draft.maker}
    for i in forward:
        equation = draft.graph.equations[i]
        if draft.layer[i] is not None or any(v in draft.varies for v in equation.operands):
            continue
        tensors = (v for v in equation.operands if v in home and not draft.scalar(v))
        homes = [home[v] for v in tensors if is_inexact(draft.graph.values[v].dtype)]  # not random keys
        if not homes:
            continue
        if draft.big(i):  # copied wherever it is used; its results live where its parameter does
            home.update((v, max(homes)) for v in equation.outputs if v not in home)
        else:
            draft.layer[i] = max(homes)


def first_use(draft: Draft, *phases: Phase) -> dict[int, int]:
    """Returns value id → the first layer that reads it in `phases`, directly or through free equations."""
    return _uses(draft, min, phases)


def last_use(draft: Draft, *phases: Phase) -> dict[int, int]:
    """Returns value id → the last layer that reads it in `phases`, directly or through free equations."""
    return _uses(draft, max, phases)


def _uses(draft: Draft, pick: Callable[..., int], phases: tuple[Phase, ...]) -> dict[int, int]:
    found: dict[int, int] = {}
    for i in reversed(draft.of_phase(*phases)):
        equation = draft.graph.equations[i]
        at = draft.layer[i]
        after = [found[v] for v in equation.outputs if v in found]
        if at is None and after:
            at = pick(after)
        if at is not None:
            for v in equation.operands:
                found[v] = pick([found.get(v, at), at])
    return found
