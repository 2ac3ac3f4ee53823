"""A flat jaxpr as a `core.graph.Graph`: value ids, rules, costs, marks and the user's source lines."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from jax import lax
from jax.extend.core import JaxprEqn, Literal, Var

from autopar.core.graph import Equation, Graph, Loop, Phase, Rule, Value
from autopar.trace import compat, marks, work
from autopar.trace.costly import costly
from autopar.trace.flat import Builder, Flat, dce, flatten
from autopar.trace.kinds import Kinds
from autopar.trace.rules import RuleBook
from autopar.trace.traced import Traced


def trace(flat: Flat, book: RuleBook, names: Mapping[Var, str] | None = None) -> Traced:
    """Returns `flat` as a graph with the equations behind it, scan bodies included.

    Args:
        flat: with marks; a missing phase is inferred, a missing layer stays None.
        book: where rules come from and are kept.
        names: tree paths of inputs and outputs.
    """
    flat = marks.complete_phases(flat)
    kinds = Kinds.among(flat.equations)
    rules = book.of_kinds(kinds)
    scans = [(i, compat.scan_of(e)) for i, e in enumerate(flat.equations)]
    bodies = {i: trace(_without_literals(dce(flatten(s.body))), book) for i, s in scans if s is not None}
    ids = value_ids(flat)
    constants = {ids[v]: value for v, value in flat.constants}
    graph = build(flat, {i: b.graph for i, b in bodies.items()}, kinds, rules, names)
    notes = dict.fromkeys([*_notes(flat, kinds, book), *(n for b in bodies.values() for n in b.notes)])
    return Traced(graph, flat.equations, tuple(ids), constants, bodies, notes=tuple(notes))


def _without_literals(body: Flat) -> Flat:
    """Returns a loop's body whose results are all variables, so that each has an id."""
    builder = Builder(list(body.equations), list(body.marks), list(body.constants))
    outputs = [
        builder.bind(lax.optimization_barrier_p, [a], [a.aval], {})[0] if isinstance(a, Literal) else a
        for a in body.outputs
    ]
    return builder.flat(body.inputs, outputs)


def value_ids(flat: Flat) -> dict[Var, int]:
    """Returns the value id of each variable: inputs, then constants, then results as they are made."""
    made = (v for e in flat.equations for v in e.outvars)
    return {v: i for i, v in enumerate([*flat.inputs, *(v for v, _ in flat.constants), *made])}


def build(
    flat: Flat,
    bodies: Mapping[int, Graph],
    kinds: Kinds,
    rules: Sequence[Rule | None],
    names: Mapping[Var, str] | None = None,
) -> Graph:
    """Returns the graph of `flat`, whose marks all have a phase.

    Args:
        flat: the equations.
        bodies: index of each scan → graph of its body.
        kinds: of the equations. rules: of the kinds.
        names: tree paths of inputs and outputs.
    """
    ids = value_ids(flat)
    names = names or {}
    layers = marks.order(flat)
    lines: dict[int, str] = {}
    position = {layer: k for k, layer in enumerate(layers)}
    alike = [_of_kind(e, rule) for e, rule in zip(kinds.first, rules, strict=True)]
    equations = [
        Equation(
            like.op,
            tuple([None if isinstance(a, Literal) else ids[a] for a in equation.invars]),
            tuple([ids[v] for v in equation.outvars]),
            like.rule,
            like.kind,
            like.flops,
            mark.phase or Phase.FORWARD,
            None if mark.layer is None else position[mark.layer],
            _source(equation, lines),
            _loop(equation, bodies[i]) if i in bodies else None,
            like.costly,
            mark.when,
        )
        for i, (equation, mark, like) in enumerate(
            zip(flat.equations, flat.marks, kinds.spread(alike), strict=True)
        )
    ]
    nameless: dict[int, Value] = {}
    return Graph(
        values=tuple([value(v, names[v]) if v in names else _nameless(v, nameless) for v in ids]),
        equations=tuple(equations),
        inputs=tuple(ids[v] for v in flat.inputs),
        outputs=tuple(None if isinstance(a, Literal) else ids[a] for a in flat.outputs),
        layers=layers,
        constants=tuple(ids[v] for v, _ in flat.constants),
    )


def _of_kind(equation: JaxprEqn, rule: Rule | None) -> Equation:
    """Returns what all equations of a kind have in common, without values."""
    kind = work.kind(equation, rule)
    return Equation(
        equation.primitive.name, (), (), rule, kind, work.flops(equation), costly=costly(equation)
    )


def _nameless(v: Any, known: dict[int, Value]) -> Value:
    """Returns the core value of a variable without a name; those of one abstract value share it."""
    found = known.get(id(v.aval))
    if found is None:
        found = known[id(v.aval)] = value(v)
    return found


def value(v: Any, name: str = "") -> Value:
    """Returns the core value of a variable."""
    return Value(tuple(map(int, v.aval.shape)), _text(v.aval.dtype), name)


@functools.cache
def _text(dtype: Any) -> str:
    """The name of an element type; NumPy takes its time to tell."""
    return str(dtype)


def _loop(equation: JaxprEqn, body: Graph) -> Loop:
    scan = compat.scan_of(equation)
    assert scan is not None, "only scans have a body"
    return Loop(body, scan.length, scan.consts, scan.carries)


def _source(equation: JaxprEqn, known: dict[int, str]) -> str:
    key = id(equation.source_info.traceback)
    if key not in known:
        known[key] = str(compat.line_of(equation) or "")
    return known[key]


def _notes(flat: Flat, kinds: Kinds, book: RuleBook) -> Sequence[str]:
    noted = []
    notes = kinds.each(lambda e: book.note(e) if compat.scan_of(e) is None else "")
    for equation, note in zip(flat.equations, notes, strict=True):
        if note:
            where = compat.line_of(equation)
            noted.append(f"{where}: {note}" if where else note)
    return noted
