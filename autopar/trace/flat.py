"""A jaxpr as one flat list of equations: calls inlined, every variable made once, name stacks absolute."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Primitive, Var, jaxpr_as_fun, new_jaxpr_eqn

from autopar.core.graph import Alternative, Phase
from autopar.trace import compat
from autopar.trace.compat import Atom


@dataclass(frozen=True, slots=True)
class Mark:
    """Where an equation belongs: its layer's name and its phase, each None when unknown; `when` as in
    `Equation`."""

    layer: str | None = None
    phase: Phase | None = None
    when: Alternative | None = None


UNMARKED = Mark()


@dataclass(frozen=True)
class Flat:
    """Equations in execution order.

    Attributes:
        inputs: variables of the arguments' leaves.
        outputs: variables (or literals) of the results' leaves.
        equations: no calls among them; scan, while and cond stay whole.
        marks: one per equation.
        constants: (variable, value) of captured arrays.
    """

    inputs: tuple[Var, ...]
    outputs: tuple[Atom, ...]
    equations: tuple[JaxprEqn, ...]
    marks: tuple[Mark, ...]
    constants: tuple[tuple[Var, Any], ...] = ()

    def check(self) -> None:
        """Raises AssertionError unless every variable is made exactly once and before it is read."""
        assert len(self.marks) == len(self.equations), "one mark per equation"
        known = {*self.inputs, *(v for v, _ in self.constants)}
        assert len(known) == len(self.inputs) + len(self.constants), "an input appears twice"
        for i, equation in enumerate(self.equations):
            for a in equation.invars:
                assert isinstance(a, Literal) or a in known, f"equation {i} ({equation.primitive}) reads {a}"
            for v in equation.outvars:
                assert v not in known, f"equation {i} ({equation.primitive}) makes {v} again"
                known.add(v)
        assert all(isinstance(a, Literal) or a in known for a in self.outputs), "an output is never made"


@dataclass
class Builder:
    """Equations being gathered into a Flat; the only mutable thing here, and it lives within one pass."""

    equations: list[JaxprEqn] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    constants: list[tuple[Var, Any]] = field(default_factory=list)

    def add(self, equation: JaxprEqn, mark: Mark = UNMARKED) -> None:
        """Appends an equation."""
        self.equations.append(equation)
        self.marks.append(mark)

    def constant(self, aval: Any, value: Any) -> Var:
        """Returns the variable of a captured array, the same one for the same array object."""
        for v, known in self.constants:
            if known is value:
                return v
        v = compat.variable(aval)
        self.constants.append((v, value))
        return v

    def bind(
        self,
        primitive: Primitive,
        operands: Sequence[Atom],
        avals: Sequence[Any],
        params: dict[str, Any],
        mark: Mark = UNMARKED,
        like: JaxprEqn | None = None,
    ) -> list[Var]:
        """Returns the results of a new equation; `like` lends its source line and name stack."""
        results = [compat.variable(aval) for aval in avals]
        source = like.source_info if like is not None else None
        self.add(new_jaxpr_eqn(list(operands), results, primitive, params, set(), source), mark)
        return results

    def flat(self, inputs: Iterable[Var], outputs: Iterable[Atom]) -> Flat:
        """Returns what was gathered."""
        return Flat(
            tuple(inputs), tuple(outputs), tuple(self.equations), tuple(self.marks), tuple(self.constants)
        )


def flatten(closed: ClosedJaxpr, *, keep: frozenset[str] = frozenset()) -> Flat:
    """Returns the equations of `closed` with every call inlined.

    jit, remat, custom_jvp, custom_vjp and the like disappear; scan, while, cond and autopar's gradient
    equation stay. Rounding to the precision that a value has anyway, which remat adds to what it keeps,
    disappears. What a backward pass recomputes keeps its barriers, so that XLA does not undo it.

    Args:
        closed: what `jax.make_jaxpr` returned.
        keep: call primitives to leave whole; `compat.DIFFERENTIABLE` where the function is still to be
            differentiated (inlining would lose its custom derivatives).
    """
    builder = Builder()
    inputs = [compat.variable(v.aval) for v in closed.jaxpr.invars]
    outputs = inline(builder, closed, inputs, keep=keep)
    return builder.flat(inputs, outputs)


def inline(
    builder: Builder,
    closed: ClosedJaxpr,
    args: Sequence[Atom],
    mark: Mark = UNMARKED,
    *,
    keep: frozenset[str] = frozenset(),
    stack: Any = None,
    caller: JaxprEqn | None = None,
) -> list[Atom]:
    """Returns the atoms of the results of `closed` applied to `args`, its equations appended to `builder`.

    Args:
        builder: where the equations go, all of them with `mark`.
        closed: the function.
        args: one atom per input.
        keep: names of call primitives to leave whole.
        stack: name stack of the place it is called from.
        caller: the equation there; its line is that of equations which no line of the user's made, such as
            those of a library's function that had been traced before.
    """
    env: dict[Var, Atom] = dict(zip(closed.jaxpr.invars, args))
    for v, value in zip(closed.jaxpr.constvars, closed.consts):
        env[v] = value if isinstance(value, Var) else builder.constant(v.aval, value)
    for equation in closed.jaxpr.eqns:
        operands = [_read(env, a) for a in equation.invars]
        known = equation if caller is None or compat.has_line(equation) else caller
        names = equation.source_info.name_stack if stack is None else stack + equation.source_info.name_stack
        inner = None if equation.primitive.name in keep else compat.called(equation)
        if compat.rounds_nothing(equation):
            results: Sequence[Atom] = operands
        elif inner is None:
            results = [compat.variable(v.aval) for v in equation.outvars]
            source = known.source_info.replace(name_stack=names)
            builder.add(equation.replace(invars=operands, outvars=results, source_info=source), mark)
        else:
            if compat.is_recomputation(equation):
                operands = [_barrier(builder, a, equation, names, mark) for a in operands]
            results = inline(builder, inner, operands, mark, keep=keep, stack=names, caller=known)
        env.update(zip(equation.outvars, results))
    return [_read(env, a) for a in closed.jaxpr.outvars]


def _read(env: dict[Var, Atom], atom: Atom) -> Atom:
    return atom if isinstance(atom, Literal) else env[atom]


def _barrier(builder: Builder, atom: Atom, like: JaxprEqn, names: Any, mark: Mark) -> Atom:
    # One barrier per operand: a barrier over many tensors would tie the placement of all of them together.
    if isinstance(atom, Literal):
        return atom
    named = like.replace(source_info=like.source_info.replace(name_stack=names))
    return builder.bind(lax.optimization_barrier_p, [atom], [atom.aval], {}, mark, named)[0]


def dce(flat: Flat) -> Flat:
    """Returns `flat` without equations that no output and no effect needs, and without unread constants."""
    live = {a for a in flat.outputs if isinstance(a, Var)}
    kept: list[int] = []
    for i in range(len(flat.equations) - 1, -1, -1):
        equation = flat.equations[i]
        if equation.effects or not live.isdisjoint(equation.outvars):
            kept.append(i)
            live.update([a for a in equation.invars if isinstance(a, Var)])
    kept.reverse()
    return replace(
        flat,
        equations=tuple(flat.equations[i] for i in kept),
        marks=tuple(flat.marks[i] for i in kept),
        constants=tuple(c for c in flat.constants if c[0] in live),
    )


def to_jaxpr(flat: Flat) -> ClosedJaxpr:
    """Returns `flat` as a closed jaxpr over its inputs (calls stay inlined)."""
    jaxpr = compat.make_jaxpr(flat.inputs, flat.outputs, flat.equations)
    return ClosedJaxpr(
        jaxpr.replace(constvars=[v for v, _ in flat.constants]), [c for _, c in flat.constants]
    )


def run(flat: Flat, args: Sequence[Any]) -> list[Any]:
    """Returns the results of `flat` on concrete (or traced) arrays, one per output."""
    return list(jaxpr_as_fun(to_jaxpr(flat))(*args))
