"""Phases of the equations that no name marks: from what they feed and what feeds them."""

from __future__ import annotations

from autopar.core.graph import Phase
from autopar.stages.draft import Draft, batch_of, spread

ORDER = {Phase.FORWARD: 0, Phase.BACKWARD: 1, Phase.APPLY: 2}


def complete_phases(draft: Draft, marked: tuple[bool, ...]) -> None:
    """Sets the phase of every equation that is not marked, and moves those that read a later phase into it.

    Upstream of the forward is forward, upstream of the backward only is backward. The rest is the apply
    phase, except what is computed from the examples themselves without any gradient (an accuracy from the
    logits): that is forward, since the apply phase sees no single micro-batch. Scalars computed from what
    the forward returned (a perplexity from the loss) are the apply phase, because they must see the
    combined value.
    """
    known = [phase for phase, mark in zip(draft.phase, marked) if mark]
    if all(phase is Phase.FORWARD for phase in known):  # inference: there is nothing else
        draft.phase = [Phase.FORWARD] * len(draft.phase)
        return
    open_ = _upstream(draft, marked)
    _downstream(draft, open_)
    _promote(draft)


def _upstream(draft: Draft, marked: tuple[bool, ...]) -> set[int]:
    """Sets the phase of what feeds the forward or backward; returns the equations that feed neither."""
    open_: set[int] = set()
    for i in reversed(range(len(marked))):
        if marked[i]:
            continue
        feeds = [draft.phase[j] for j in draft.readers(i) if j not in open_]
        early = [phase for phase in feeds if phase is not Phase.APPLY]
        if early:
            draft.phase[i] = min(early, key=ORDER.__getitem__)
        else:
            draft.phase[i] = Phase.APPLY
            open_.add(i)
    return open_


def _downstream(draft: Draft, open_: set[int]) -> None:
    """Moves into the forward what reads single examples and no gradient."""
    equations = draft.graph.equations
    late = {v for i, e in enumerate(equations) if draft.phase[i] is Phase.BACKWARD for v in e.outputs}
    late = spread(draft.graph, late)
    examples = batch_of(draft.graph)
    for i in sorted(open_):
        reads = equations[i].operands
        if any(v in late for v in reads):
            continue
        made_early = [v for v in reads if v in draft.maker and draft.phase[draft.maker[v]] is Phase.FORWARD]
        tensors = any(v in draft.varies and not draft.scalar(v) for v in made_early)
        follows = any(draft.maker[v] in open_ and v in draft.varies for v in made_early)
        if tensors or follows or any(v in examples for v in reads):
            draft.phase[i] = Phase.FORWARD


def _promote(draft: Draft) -> None:
    """Moves every equation to at least the phase of what it reads (a second gradient pass becomes apply)."""
    for i in range(len(draft.phase)):
        before = [draft.phase[j] for j in draft.makers(i)]
        draft.phase[i] = max([draft.phase[i], *before], key=ORDER.__getitem__)
