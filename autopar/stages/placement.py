"""A stage and a level for every equation, from the stage of every layer; checks the direction of data."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.core.errors import PlanError
from autopar.core.graph import Equation, Graph, Phase
from autopar.stages.draft import batch_of, spread

GLOBAL = 0
"""The stage that computes scalars which mix stages (a global norm)."""

Ready = dict[int, int]
"""Stage → the level after which what is read from there is ready; -1: before the apply phase."""


@dataclass(frozen=True)
class Placement:
    """Where every equation runs.

    Attributes:
        stage: per equation; None: free, copied into every segment that needs it.
        level: per equation of the apply phase: how many stage crossings inside that phase precede it.
        reads: per equation, the stages it reads from, itself or through free equations, and when that is
        ready.
        varies: values that depend on the batch.
        maker: value id → index of the equation that makes it.
    """

    stage: tuple[int | None, ...]
    level: tuple[int, ...]
    reads: tuple[Ready, ...]
    varies: frozenset[int]
    maker: dict[int, int]


def place(graph: Graph, stage_of_layer: tuple[int, ...]) -> Placement:
    """Returns the stage and level of every equation.

    An equation with a layer runs on its layer's stage. Without a layer it is free, except: scalars of the
    apply phase that depend on a stage's values run on that stage, or on `GLOBAL` if on several; and, in
    graphs that `assign` did not complete, forward equations behind staged ones run on the latest of those
    stages, backward ones on the earliest.

    Raises:
        PlanError: a forward value would flow to an earlier stage, or a cotangent to a later one.
    """
    maker = graph.producers()
    stage: list[int | None] = []
    level: list[int] = []
    reads: list[Ready] = []
    for equation in graph.equations:
        ready: Ready = {}
        for j in dict.fromkeys(maker[v] for v in equation.operands if v in maker):
            at = stage[j]
            made = (
                {at: level[j] if graph.equations[j].phase is Phase.APPLY else -1}
                if at is not None
                else reads[j]
            )
            for s, when in made.items():
                ready[s] = max(ready.get(s, -1), when)
        at = (
            stage_of_layer[equation.layer]
            if equation.layer is not None
            else _unlayered(graph, equation, ready)
        )
        stage.append(at)
        level.append(_level(ready, at) if equation.phase is Phase.APPLY else 0)
        reads.append(ready)
    _check_direction(graph, stage, maker)
    _delay(graph, stage, level)
    varies = frozenset(spread(graph, batch_of(graph)))
    return Placement(tuple(stage), tuple(level), tuple(reads), varies, maker)


def _unlayered(graph: Graph, equation: Equation, ready: Ready) -> int | None:
    if not ready:
        return None
    if equation.phase is Phase.FORWARD:
        return max(ready)
    if equation.phase is Phase.BACKWARD:
        return min(ready)
    if any(graph.values[v].size > 1 for v in equation.outputs):
        return None  # a scalar spread to a tensor: cheaper copied than sent
    return next(iter(ready)) if len(ready) == 1 else GLOBAL


def _level(ready: Ready, at: int | None) -> int:
    """Returns the first level at which everything read is there: one more after another stage's level."""
    return max([0, *(when + (s != at) for s, when in ready.items())])


def _delay(graph: Graph, stage: list[int | None], level: list[int]) -> None:
    """Moves work of the apply phase into the level that reads it, where its own stage alone does.

    Else the first part of every update (a moment times its decay) would be written to memory between levels.
    """
    readers = graph.consumers
    for i in reversed(range(len(graph.equations))):
        equation = graph.equations[i]
        after = [j for v in equation.outputs for j in readers.get(v, ())]
        own = stage[i] is not None and all(stage[j] == stage[i] for j in after)
        if equation.phase is Phase.APPLY and own and after:
            level[i] = max(level[i], min(level[j] for j in after))


def _check_direction(graph: Graph, stage: list[int | None], maker: dict[int, int]) -> None:
    for i, equation in enumerate(graph.equations):
        for v in equation.operands:
            j = maker.get(v)
            if j is None or stage[j] is None or stage[i] is None or equation.phase is Phase.APPLY:
                continue
            _check_edge(graph.equations[j], equation, stage[j] or 0, stage[i] or 0)


def _check_edge(made: Equation, read: Equation, source: int, to: int) -> None:
    where = f"{read.op} at {read.source or 'an unknown line'}"
    if made.phase is Phase.APPLY or (made.phase is Phase.BACKWARD and read.phase is Phase.FORWARD):
        raise PlanError(
            f"{where}: the {read.phase} phase of a micro-batch reads a result of the {made.phase} phase "
            f"({made.op} at {made.source or 'an unknown line'}); move it into the update"
        )
    if made.phase is Phase.FORWARD and source > to:
        raise PlanError(
            f"{where}: stage {to} would need a forward value of the later stage {source} "
            f"({made.op} at {made.source or 'an unknown line'}); put both into one stage"
        )
    if made.phase is Phase.BACKWARD and source < to:
        raise PlanError(
            f"{where}: stage {to} would need a cotangent of the earlier stage {source} "
            f"({made.op} at {made.source or 'an unknown line'}); put both into one stage"
        )
