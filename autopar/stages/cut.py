"""Segments: the parts of a step that one stage runs as one function, and which stages hold which tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from autopar.core.errors import PlanError
from autopar.core.graph import Graph, Phase
from autopar.core.program import Segment
from autopar.stages.draft import batch_of
from autopar.stages.placement import Placement, place

ORDER = {Phase.FORWARD: 0, Phase.BACKWARD: 1, Phase.APPLY: 2}


class Part(NamedTuple):
    """Which segment: sorted, parts are in an order in which they can run."""

    order: int  # forward, backward, apply
    rank: int  # forward: the stage; backward: from the last stage down; apply: the level
    stage: int


def cut(graph: Graph, stage_of_layer: tuple[int, ...]) -> tuple[Segment, ...]:
    """Returns the segments of every stage in an order in which they can run.

    Equations that belong to no layer are copied into every segment that needs them. A value is an output of
    at most one segment. `inputs` and `outputs` are in ascending order of value id; inputs are arguments,
    constants and outputs of other segments; outputs are values that other segments read or that are results
    of the graph. The new value of a piece of state is an output of a segment on its first holder (see
    `holders`). A per-micro-batch value that an apply segment reads, or that is a result, is its combination
    over the micro-batches (`Graph.combine`). Equations that nothing needs and that belong to no layer are
    left out.

    With one stage: "step" holds everything if there is one micro-batch, else "micro" (forward and backward)
    and "apply".

    Args:
        graph: completed by `assign`.
        stage_of_layer: the stage of every layer, from 0, in order; () for a graph without layers.

    Raises:
        PlanError: stages that are not consecutive; a forward value that would flow to an earlier stage or a
            cotangent to a later one; a tensor of single examples that the apply phase reads.
    """
    _check_stages(graph, stage_of_layer)
    stages = stage_of_layer[-1] + 1 if stage_of_layer else 1
    if stages == 1 and graph.microbatches == 1:
        return (_whole(graph),)
    return _Cutter(graph, place(graph, stage_of_layer), stages).segments()


def _check_stages(graph: Graph, stage_of_layer: tuple[int, ...]) -> None:
    if len(stage_of_layer) != len(graph.layers):
        raise PlanError(f"expected a stage for each of {len(graph.layers)} layers, got {len(stage_of_layer)}")
    steps = [b - a for a, b in zip((0, *stage_of_layer), stage_of_layer)]
    if any(step not in (0, 1) for step in steps) or (steps and steps[0] != 0):
        raise PlanError(f"expected stages counting up from 0 along the layers, got {stage_of_layer}")


def _whole(graph: Graph) -> Segment:
    made = {v for e in graph.equations for v in e.outputs}
    read = {v for e in graph.equations for v in e.operands} - made
    outputs = {v for v in graph.outputs if v in made}
    return Segment("step", 0, Phase.FORWARD, 0, tuple(range(len(graph.equations))), _ids(read), _ids(outputs))


def _ids(values: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(sorted(v for v in set(values) if v is not None))


class _Cutter:
    """Groups equations into parts: `roots` are the staged equations of each, `extra` its free outputs."""

    def __init__(self, graph: Graph, placed: Placement, stages: int):
        self.graph, self.placed, self.stages = graph, placed, stages
        self.has_apply = any(e.phase is Phase.APPLY for e in graph.equations)
        self.combined = {v for v, _ in graph.combine}
        self.roots: dict[Part, list[int]] = {}
        self.extra: dict[Part, set[int]] = {}
        for i, at in enumerate(placed.stage):
            if at is not None:
                part = self.part(graph.equations[i].phase, at, placed.level[i])
                self.roots.setdefault(part, []).append(i)
        self._free_results()
        self._free_per_example()

    def part(self, phase: Phase, stage: int, level: int = 0) -> Part:
        if self.stages == 1:
            return Part(ORDER[Phase.APPLY if phase is Phase.APPLY else Phase.FORWARD], 0, 0)
        rank = {Phase.FORWARD: stage, Phase.BACKWARD: self.stages - 1 - stage, Phase.APPLY: level}[phase]
        return Part(ORDER[phase], rank, stage)

    def is_free(self, value: int | None) -> bool:
        maker = self.placed.maker.get(value) if value is not None else None
        return maker is not None and self.placed.stage[maker] is None

    def per_example(self, value: int) -> bool:
        """Returns whether a free value has to be made in the micro-batches, not in the apply phase."""
        early = self.graph.equations[self.placed.maker[value]].phase is not Phase.APPLY
        return early and (value in self.combined or value in self.placed.varies or not self.has_apply)

    def _free_results(self) -> None:
        """Gives each result of a free equation (a counter) to the first stage that reads its old value."""
        graph, placed = self.graph, self.placed
        old = {graph.outputs[o]: graph.inputs[i] for o, i in graph.aliases}
        for v in _ids(w for w in graph.outputs if self.is_free(w)):
            maker = placed.maker[v]
            stage = min((part.stage for part in self.roots if old.get(v) in self.reads(part)), default=0)
            if self.per_example(v):
                stage = self.stages - 1 if v in placed.varies else stage
                part = self.part(graph.equations[maker].phase, stage)
            else:
                crossings = [when + (s != stage) for s, when in placed.reads[maker].items()]
                part = self._update(stage, max([0, *crossings]))
            self.extra.setdefault(part, set()).add(v)

    def _update(self, stage: int, level: int) -> Part:
        """Returns the stage's first update part at this level or later; a new one if there is none."""
        wanted = self.part(Phase.APPLY, stage, level)
        return min((p for p in self.roots if p.stage == stage and p >= wanted), default=wanted)

    def _free_per_example(self) -> None:
        """Gives free values of single examples that the apply phase reads (a token count) to the last one."""
        for part in {*self.roots, *self.extra}:
            if part.order == ORDER[Phase.APPLY]:
                for v in self.reads(part):
                    if self.is_free(v):
                        phase = self.graph.equations[self.placed.maker[v]].phase
                        self.extra.setdefault(self.part(phase, self.stages - 1), set()).add(v)

    def equations(self, part: Part) -> list[int]:
        """Returns the equations of a part, with the free ones that they need, in order."""
        found = set(self.roots.get(part, ()))
        todo = [*self.extra.get(part, ()), *(v for i in found for v in self.graph.equations[i].operands)]
        while todo:
            v = todo.pop()
            i = self.placed.maker.get(v)
            if i is None or i in found or not self.is_free(v):
                continue
            if part.order == ORDER[Phase.APPLY] and self.per_example(v):
                continue
            found.add(i)
            todo += self.graph.equations[i].operands
        return sorted(found)

    def reads(self, part: Part) -> set[int]:
        """Returns the values that a part needs from outside."""
        equations = [self.graph.equations[i] for i in self.equations(part)]
        return {v for e in equations for v in e.operands} - {v for e in equations for v in e.outputs}

    def segments(self) -> tuple[Segment, ...]:
        parts = sorted({*self.roots, *self.extra})
        reads = {part: self.reads(part) for part in parts}
        needed = set(self.graph.outputs).union(*reads.values())
        self._check_examples(reads)
        return tuple(self._segment(part, reads[part], needed) for part in parts)

    def _segment(self, part: Part, reads: set[int], needed: set[int | None]) -> Segment:
        made = {v for i in self.roots.get(part, ()) for v in self.graph.equations[i].outputs}
        made |= self.extra.get(part, set())
        phase = next(phase for phase, order in ORDER.items() if order == part.order)
        level = part.rank if phase is Phase.APPLY else 0
        name = f"apply.{level}_{part.stage}" if phase is Phase.APPLY else f"{phase}_{part.stage}"
        if self.stages == 1:
            name = "apply" if phase is Phase.APPLY else "micro"
        return Segment(
            name, part.stage, phase, level, tuple(self.equations(part)), _ids(reads), _ids(made & needed)
        )

    def _check_examples(self, reads: dict[Part, set[int]]) -> None:
        """Raises where the apply phase, which runs once a step, reads the examples of one micro-batch."""
        if self.graph.microbatches == 1:
            return
        examples = batch_of(self.graph)
        for part, values in reads.items():
            if part.order == ORDER[Phase.APPLY] and values & examples:
                v = min(values & examples)
                i = next(i for i in self.equations(part) if v in self.graph.equations[i].operands)
                equation, name = self.graph.equations[i], self.graph.values[v].name or f"v{v}"
                raise PlanError(
                    f"{equation.op} at {equation.source or 'an unknown line'}: the update reads {name!r} "
                    f"of the batch, of which only one of {self.graph.microbatches} micro-batches is there; "
                    "compute it in the loss function, or use 1 micro-batch"
                )


def holders(graph: Graph, segments: tuple[Segment, ...]) -> dict[int, tuple[int, ...]]:
    """Returns argument or constant id → the stages that hold it, its home first.

    The home of state that the step replaces is the stage whose segment makes the new value; of anything
    else the first stage that reads it. Other holders get the new value from the home. An argument that is
    passed on unread is on stage 0; one that is neither read nor returned has no holder.
    """
    read: dict[int, list[int]] = {v: [] for v in (*graph.inputs, *graph.constants)}
    for segment in segments:
        for v in segment.inputs:
            if v in read:
                read[v].append(segment.stage)
    made = {v: segment.stage for segment in segments for v in segment.outputs}
    held = {v: tuple(sorted(set(stages))) for v, stages in read.items()}
    for o in graph.outputs:
        if o in held and not held[o]:
            held[o] = (0,)
    for o, position in graph.aliases:
        v, new = graph.inputs[position], graph.outputs[o]
        home = made.get(new, -1) if new is not None else -1
        if home >= 0:
            held[v] = (home, *(s for s in held[v] if s != home))
    return held
