"""Layers that compute the same: they differ in variables, names and lines only, and share a derivative."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from autopar.trace import compat
from autopar.trace.compat import Atom
from autopar.trace.flat import flatten, to_jaxpr
from autopar.trace.layer_vjp import Derivative, Layer, differentiate_layer

_CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})


class _Unlike(Exception):
    """Something whose equality cannot be told."""


class Differentiator:
    """Differentiates layers, equal ones once. relevant: as `differentiate_layer` takes it."""

    def __init__(self, relevant: frozenset[Var]):
        self._relevant = relevant
        self._known: dict[Hashable, list[_Known]] = {}

    def __call__(self, layer: Layer, remat: Any) -> Derivative:
        """Returns the derivative of a layer, its equations at the layer's own lines and names."""
        key = twin_key(layer, self._relevant, remat)
        alike = [] if key is None else self._known.setdefault(key, [])
        rules = _rules(layer) if alike else None
        found = next((x for x in alike if rules is not None and x.rules == rules), None)
        if found is None:
            own = differentiate_layer(layer, self._relevant, remat)
            alike.append(_Known(layer, _opened(own)))
            return own
        twin, known = found.layer, found.derivative
        place = Relocation.between(twin, layer)
        outputs, inputs = dict(zip(twin.outputs, layer.outputs)), dict(zip(twin.inputs, layer.inputs))
        return Derivative(
            _placed(known.forward, place),
            None if known.backward is None else _placed(known.backward, place),
            tuple(outputs[v] for v in known.targets),
            tuple(inputs[v] for v in known.wanted),
        )


@dataclass
class _Known:
    """A layer that has been differentiated."""

    layer: Layer
    derivative: Derivative

    @cached_property
    def rules(self) -> Hashable | None:
        return _rules(self.layer)


def _opened(known: Derivative) -> Derivative:
    """Returns a derivative with its calls inlined, once for all twins."""
    backward = None if known.backward is None else to_jaxpr(flatten(known.backward))
    return replace(known, forward=to_jaxpr(flatten(known.forward)), backward=backward)


def _placed(closed: ClosedJaxpr, place: Relocation) -> ClosedJaxpr:
    return ClosedJaxpr(closed.jaxpr.replace(eqns=[place(e) for e in closed.jaxpr.eqns]), closed.consts)


def twin_key(layer: Layer, relevant: frozenset[Var], remat: Hashable) -> Hashable | None:
    """Returns a key, equal for layers whose derivatives are equal but for variables, names and lines, if they
    also have the same rules where they call functions with a derivative of their own.

    Args:
        layer: what will be differentiated.
        relevant: variables that derivatives flow through. remat: what is computed again.

    Returns:
        None where equality cannot be told (a parameter without a hash).
    """
    numbers: dict[Var, int] = {}
    try:
        inputs = tuple((v.aval, v in relevant) for v in layer.inputs)
        numbers.update(zip(layer.inputs, itertools.count()))
        equations = _equations(layer.equations, numbers, rules=False)
        made = tuple(v in relevant for e in layer.equations for v in e.outvars)
        outputs = tuple(numbers[v] for v in layer.outputs)
    except _Unlike:
        return None
    key = inputs, equations, made, outputs, remat
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _rules(layer: Layer) -> Hashable | None:
    """Returns a key, equal for layers of one key if all functions with a derivative of their own have the
    same; None where that cannot be told."""
    if not _has_rules(layer.equations):
        return ()
    try:
        return _equations(layer.equations, dict(zip(layer.inputs, itertools.count())), rules=True)
    except _Unlike:
        return None


def _has_rules(equations: Sequence[JaxprEqn]) -> bool:
    return any(
        e.primitive.name in _CUSTOM or any(_has_rules(x.jaxpr.eqns) for x in compat.inner_jaxprs(e))
        for e in equations
    )


def _equations(equations: Sequence[JaxprEqn], numbers: dict[Var, int], rules: bool) -> tuple[Hashable, ...]:
    """Returns a key per equation, its variables by number; those it makes are added to `numbers`.

    rules: whether what calls with a derivative of their own differentiate to is part of the key.
    """
    found: list[Hashable] = []
    for e in equations:
        operands = tuple(_atom(a, numbers) for a in e.invars)
        numbers.update((v, len(numbers)) for v in e.outvars)
        made = tuple(v.aval for v in e.outvars)
        names = sorted(e.params.keys() - _HELD)
        params = tuple((name, _param(e.params[name], rules)) for name in names)
        custom = _derivative(e) if rules and e.primitive.name in _CUSTOM else ()
        found.append((e.primitive, params, custom, operands, made, compat.context_of(e)))
    return tuple(found)


_HELD = frozenset({"jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "fwd", "bwd"})
"""Parameters that hold the rule of a custom derivative: what it gives is compared instead."""


def _atom(a: Atom, numbers: dict[Var, int]) -> Hashable:
    if not isinstance(a, Literal):
        return numbers[a]
    aval: Any = a.aval
    if jnp.issubdtype(aval.dtype, jax.dtypes.extended):
        raise _Unlike
    value = np.asarray(a.val)
    return value.dtype.str, value.shape, value.tobytes(), aval


def _param(value: Any, rules: bool) -> Hashable:
    if isinstance(value, ClosedJaxpr | Jaxpr):
        return _jaxpr(compat.closed(value), rules)
    if isinstance(value, tuple | list):
        return type(value).__name__, tuple(_param(v, rules) for v in value)
    if isinstance(value, dict):
        return tuple((k, _param(v, rules)) for k, v in sorted(value.items()))
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, bool | int | float | complex):
        return type(value), repr(value)  # 0 == False == -0.0
    return value


def _jaxpr(closed: ClosedJaxpr, rules: bool) -> Hashable:
    jaxpr = closed.jaxpr
    numbers: dict[Var, int] = dict(zip([*jaxpr.constvars, *jaxpr.invars], itertools.count()))
    arguments = tuple(v.aval for v in numbers)
    equations = _equations(jaxpr.eqns, numbers, rules)
    outputs = tuple(_atom(a, numbers) for a in jaxpr.outvars)
    return arguments, equations, outputs, tuple(map(_Same, closed.consts))


@dataclass(frozen=True, eq=False)
class _Same:
    """An array that is compared by identity, and held so that no other gets its own."""

    array: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.array is other.array

    def __hash__(self) -> int:
        return id(self.array)


def _derivative(equation: JaxprEqn) -> Hashable:
    """Returns what a call with a derivative of its own differentiates to."""
    operands = [a for a in equation.invars if isinstance(a, Var)]
    if len(operands) != 1:  # its rule may be asked for the derivative of some operands only
        raise _Unlike
    results = [compat.variable(v.aval) for v in equation.outvars]
    one = compat.make_jaxpr(operands, results, [equation.replace(outvars=results)])
    function = jaxpr_as_fun(ClosedJaxpr(one, ()))

    def both(x: Any, cotangents: Any) -> Any:
        values, pullback = jax.vjp(function, x)
        return values, pullback(cotangents)

    made = jax.make_jaxpr(both)(operands[0].aval, [v.aval for v in equation.outvars])
    return _jaxpr(made, rules=False)  # what a rule calls in turn is not differentiated again


@dataclass
class Relocation:
    """Where the equations of a layer come from, in terms of the twin that was differentiated for it.

    Attributes:
        lines: identity of a traceback of the twin → the layer's own.
        scopes: scopes of the twin, outermost first → the layer's own.
    """

    lines: dict[int, Any] = field(default_factory=dict)
    scopes: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict)
    _known: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def between(cls, twin: Layer, layer: Layer) -> Relocation:
        """Returns how to get from a twin's places to the layer's."""
        found = cls()
        for theirs, own in zip(twin.equations, layer.equations, strict=True):
            found._add(theirs, own)
        return found

    def _add(self, theirs: JaxprEqn, own: JaxprEqn) -> None:
        self.lines[id(theirs.source_info.traceback)] = own.source_info.traceback
        names = compat.scopes_of(theirs), compat.scopes_of(own)
        if len(names[0]) == len(names[1]):
            for n in range(1, len(names[0]) + 1):
                self.scopes.setdefault(names[0][:n], names[1][:n])
        pairs = zip(compat.inner_jaxprs(theirs), compat.inner_jaxprs(own), strict=True)
        for a, b in pairs:
            for inner, mine in zip(a.jaxpr.eqns, b.jaxpr.eqns, strict=True):
                self._add(inner, mine)

    def __call__(self, equation: JaxprEqn) -> JaxprEqn:
        """Returns an equation of the twin's derivative at the layer's own place."""
        source = equation.source_info
        if source.name_stack not in self._known:
            self._known[source.name_stack] = compat.renamed(source.name_stack, self._renamed)
        line = self.lines.get(id(source.traceback), source.traceback)
        moved = source.replace(traceback=line, name_stack=self._known[source.name_stack])
        return equation.replace(source_info=moved)

    def _renamed(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Returns scopes with every longest run that the twin has replaced by the layer's."""
        done, at = list[str](), 0
        while at < len(names):
            ends = range(len(names), at, -1)
            end = next((n for n in ends if names[at:n] in self.scopes), None)
            done += (names[at],) if end is None else self.scopes[names[at:end]]
            at = at + 1 if end is None else end
        return tuple(done)
