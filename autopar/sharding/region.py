"""A region: the equations of one stage cut out of the graph, renumbered, with what its values are to the
rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from autopar.core.graph import Combine, Equation, Graph, Loop, Phase, Value


@dataclass(frozen=True)
class Region:
    """Some equations of a graph, with value ids and equation indices counted from 0 in order of appearance.

    Attributes:
        values, equations: renumbered.
        ids: value id → its id in the graph. indices: equation → its index in the graph.
        state: inputs that stay: parameters, optimizer state, constants.
        arriving: inputs that come with every micro-batch or from other regions, and choose their layout
            freely.
        ties: (value, state input) where the value is the input's successor in the next step.
        leaving: values read outside of the region. results: those of them that the step returns to the
            caller.
        combine: how per-micro-batch values become one value per step.
        microbatches: per step.
        whole: the region is the whole graph: forward and backward run as one program.
    """

    values: tuple[Value, ...]
    equations: tuple[Equation, ...]
    ids: tuple[int, ...]
    indices: tuple[int, ...]
    state: tuple[int, ...]
    arriving: tuple[int, ...]
    ties: tuple[tuple[int, int], ...]
    leaving: tuple[int, ...]
    results: tuple[int, ...]
    combine: tuple[tuple[int, Combine], ...]
    microbatches: int
    whole: bool

    def program(self, phase: Phase) -> str:
        """Returns the compiled program that a phase's equations are part of."""
        if not self.whole:
            return str(phase)
        return "step" if self.microbatches == 1 or phase is not Phase.APPLY else str(phase)

    def times(self, phase: Phase) -> int:
        """Returns how often an equation of this phase runs in one step."""
        return 1 if phase is Phase.APPLY else self.microbatches


def extract(graph: Graph, equations: Iterable[int]) -> Region:
    """Returns the region of these equations. Values that an alias ties to a state input of the region stay
    tied.
    """
    indices = tuple(sorted(set(equations)))
    chosen = [graph.equations[i] for i in indices]
    number: dict[int, int] = {}
    for equation in chosen:
        for v in (*equation.operands, *equation.outputs):
            number.setdefault(v, len(number))
    made = {v for equation in chosen for v in equation.outputs}
    lasting = ({*graph.inputs} | {*graph.constants}) - {*graph.batch}
    inputs = [v for v in number if v not in made]
    ties = _ties(graph, number, made)
    outside = _read_outside(graph, indices, made)
    tied = {v for v, _ in ties}
    results = [v for v in dict.fromkeys(graph.outputs) if v in made and v not in tied]
    return Region(
        values=tuple(graph.values[v] for v in number),
        equations=tuple(_renumber(equation, number) for equation in chosen),
        ids=tuple(number),
        indices=indices,
        state=tuple(number[v] for v in inputs if v in lasting),
        arriving=tuple(number[v] for v in inputs if v not in lasting),
        ties=tuple((number[v], number[i]) for v, i in ties),
        leaving=tuple(sorted(number[v] for v in outside | {*results})),
        results=tuple(number[v] for v in results if v is not None),
        combine=tuple((number[v], how) for v, how in graph.combine if v in made),
        microbatches=graph.microbatches,
        whole=len(indices) == len(graph.equations),
    )


def _ties(graph: Graph, number: dict[int, int], made: set[int]) -> list[tuple[int, int]]:
    """Returns (value made here, state input read here), each value with its first input only."""
    found: dict[int, int] = {}
    taken = set[int]()
    for output, position in graph.aliases:
        v, i = graph.outputs[output], graph.inputs[position]
        same = v in made and i in number and graph.values[v].shape == graph.values[i].shape
        if same and v is not None and v not in found and i not in taken:
            found[v] = i
            taken.add(i)
    return list(found.items())


def _read_outside(graph: Graph, indices: tuple[int, ...], made: set[int]) -> set[int]:
    if len(indices) == len(graph.equations):
        return set()
    inside, readers = {*indices}, graph.consumers
    return {v for v in made if v in readers and not inside.issuperset(readers[v])}


def _renumber(equation: Equation, number: dict[int, int]) -> Equation:
    inputs = tuple([None if v is None else number[v] for v in equation.inputs])
    return equation.between(inputs, tuple([number[v] for v in equation.outputs]))


def signature(graph: Graph, equations: Iterable[int]) -> str:
    """Returns a key that equal layers of a model share: what a plan depends on, without names."""
    return region_key(extract(graph, equations))


def region_key(region: Region) -> str:
    """Returns the key of a region: a digest of shapes, rules, phases and roles."""
    rules: dict[int, str] = {}
    parts: list[object] = [
        [(v.shape, v.dtype) for v in region.values],
        region.state,
        region.arriving,
        region.ties,
        region.leaving,
        region.results,
        region.combine,
        region.microbatches,
        region.whole,
        [_equation_key(e, rules) for e in region.equations],
    ]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _equation_key(e: Equation, rules: dict[int, str]) -> tuple[object, ...]:
    """Returns the key of an equation. rules: texts of those met before; equations of a kind share theirs."""
    rule = rules.get(id(e.rule))
    if rule is None:
        rule = rules[id(e.rule)] = repr(e.rule)
    loop = e.loop and _loop_key(e.loop, rules)
    when = e.when and (e.when[0], e.when[1].value)
    return e.inputs, e.outputs, rule, e.kind.value, e.flops, e.phase.value, e.costly, loop, when


def _loop_key(loop: Loop, rules: dict[int, str]) -> tuple[object, ...]:
    body = loop.body
    shapes = tuple((v.shape, v.dtype) for v in body.values)
    inside = tuple(_equation_key(e, rules) for e in body.equations)
    return loop.length, loop.consts, loop.carries, shapes, body.inputs, body.outputs, inside
