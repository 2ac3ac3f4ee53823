"""A graph whose marks are being completed: phases and layers as lists, with the look-ups that rules need."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from autopar.core.graph import Graph, Phase


@dataclass
class Draft:
    """Working state of `assign`; never leaves this room.

    Attributes:
        graph: what is being completed.
        phase, layer: of every equation, so far.
        maker: value id → index of the equation that makes it.
        users: value id → indices of the equations that read it.
        varies: value ids that depend on the batch.
        state: value ids that depend on other arguments, or on constants that have a dim.
        mixes: value ids that depend on both: what a model really computes.
    """

    graph: Graph
    phase: list[Phase]
    layer: list[int | None]
    maker: dict[int, int] = field(default_factory=dict)
    users: dict[int, list[int]] = field(default_factory=dict)
    varies: set[int] = field(default_factory=set)
    state: set[int] = field(default_factory=set)
    mixes: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, graph: Graph) -> Draft:
        """Returns a draft with the graph's own marks."""
        draft = cls(graph, [e.phase for e in graph.equations], [e.layer for e in graph.equations])
        draft.maker, draft.users = graph.producers(), graph.consumers
        draft.varies = spread(graph, batch_of(graph))
        others = [*graph.inputs, *(v for v in graph.constants if graph.values[v].shape)]
        draft.state = spread(graph, set(others) - batch_of(graph))
        known = graph.batch or graph.aliases
        draft.mixes = draft.varies & draft.state if known else _of_several(graph, others)
        return draft

    @cached_property
    def scalars(self) -> list[bool]:
        """Whether each value is a scalar."""
        return [value.size <= 1 for value in self.graph.values]

    def scalar(self, value: int) -> bool:
        return self.scalars[value]

    def big(self, equation: int) -> bool:
        """Returns whether any result of the equation is more than a scalar."""
        return any(not self.scalar(v) for v in self.graph.equations[equation].outputs)

    def of_phase(self, *phases: Phase) -> list[int]:
        return [i for i, phase in enumerate(self.phase) if phase in phases]

    def makers(self, equation: int) -> Iterator[int]:
        """Yields the equations whose results this one reads."""
        for v in self.graph.equations[equation].operands:
            if v in self.maker:
                yield self.maker[v]

    def readers(self, equation: int) -> Iterator[int]:
        """Yields the equations that read a result of this one."""
        for v in self.graph.equations[equation].outputs:
            yield from self.users.get(v, ())

    def layers_before(self, equation: int, *phases: Phase) -> list[int]:
        """Returns the layers of the equations in `phases` that this one reads from."""
        return [
            k for j in self.makers(equation) if self.phase[j] in phases and (k := self.layer[j]) is not None
        ]

    def finish(self) -> Graph:
        """Returns the graph with these marks."""
        marks = zip(self.graph.equations, self.phase, self.layer)
        equations = tuple(
            e if e.phase is phase and e.layer == layer else e.placed(phase, layer)
            for e, phase, layer in marks
        )
        return replace(self.graph, equations=equations)


def _of_several(graph: Graph, roots: list[int]) -> set[int]:
    """Returns the values computed from more than one of the roots; stands in where the batch is not known."""
    found = {v: 1 << k for k, v in enumerate(roots)}
    for equation in graph.equations:
        union = 0
        for v in equation.operands:
            union |= found.get(v, 0)
        found.update((v, union) for v in equation.outputs)
    return {v for v, union in found.items() if union & (union - 1)}


def batch_of(graph: Graph) -> set[int]:
    """Returns the inputs that differ per micro-batch; where none are named, those that are not state."""
    return set(graph.batch) or set(graph.inputs) - {graph.inputs[i] for _, i in graph.aliases}


def spread(graph: Graph, roots: set[int]) -> set[int]:
    """Returns the roots and every value computed from one of them."""
    found = set(roots)
    for equation in graph.equations:
        if not found.isdisjoint(equation.operands):
            found.update(equation.outputs)
    return found
