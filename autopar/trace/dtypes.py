"""Rewrites an equation to another dtype: for devices that lack the one it was captured in."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from autopar.trace import compat
from autopar.trace.kinds import signature


def mentions(equation: JaxprEqn, names: Mapping[str, str]) -> bool:
    """Returns whether an operand, a result or a parameter of an equation has one of the dtypes named."""
    avals: list[Any] = [a.aval for a in (*equation.invars, *equation.outvars)]
    if any(str(getattr(a, "dtype", "")) in names for a in avals):
        return True
    if any(mentions(e, names) for inner in compat.inner_jaxprs(equation) for e in inner.jaxpr.eqns):
        return True
    return any(_names_dtype(value, names) for value in equation.params.values())


def substituted(equation: JaxprEqn, names: Mapping[str, str]) -> JaxprEqn | None:
    """Returns the equation on operands of other dtypes, None where it would mean something else.

    Parameters that name a dtype and literals are rewritten; the results must then have the captured shapes,
    in the dtypes that `names` makes of the captured ones.
    """
    try:
        params = {k: _swapped(v, names) for k, v in equation.params.items()}
    except _Meant:
        return None
    if isinstance(params.get("precision"), lax.DotAlgorithm | lax.DotAlgorithmPreset):
        params["precision"] = None  # it names the product's dtype
    invars = [_literal(a, names) if isinstance(a, Literal) else _variable(a, names) for a in equation.invars]
    outvars = [_variable(v, names) for v in equation.outvars]
    other = equation.replace(invars=invars, outvars=outvars, params=params)
    return other if _results(other) == [(v.aval.shape, v.aval.dtype) for v in outvars] else None


def _results(equation: JaxprEqn) -> list[Any] | None:
    key = signature(equation)
    if key not in _KNOWN:
        _KNOWN[key] = _abstract(equation)
    return _KNOWN[key]


_KNOWN: dict[Any, list[Any] | None] = {}  # a step has few distinct equations, and asking costs a trace each


def _abstract(equation: JaxprEqn) -> list[Any] | None:
    """Returns shape and dtype of each result as the primitive itself sees them, None when it refuses."""
    avals: list[Any] = [a.aval for a in equation.invars if not isinstance(a, Literal)]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    try:
        made = jax.eval_shape(functools.partial(_evaluate, equation), *shapes)
    except (TypeError, ValueError):
        return None
    return [(s.shape, s.dtype) for s in made]


def _evaluate(equation: JaxprEqn, *operands: Any) -> list[Any]:
    return compat.evaluate(equation, operands)


class _Meant(Exception):
    """An equation inside of a parameter means the dtype's own bits."""


def _swapped(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, tuple) and any(isinstance(item, ClosedJaxpr | Jaxpr) for item in value):
        return tuple(_swapped(item, names) for item in value)  # the branches of a cond
    if isinstance(value, ClosedJaxpr):
        return ClosedJaxpr(_jaxpr(value.jaxpr, names), [_constant(c, names) for c in value.consts])
    if isinstance(value, Jaxpr):
        return _jaxpr(value, names)
    return jnp.dtype(names[np.dtype(value).name]) if _names_dtype(value, names) else value


def _names_dtype(value: Any, names: Mapping[str, str]) -> bool:
    is_dtype = isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic))
    return is_dtype and np.dtype(value).name in names


def _constant(value: Any, names: Mapping[str, str]) -> Any:
    target = names.get(str(getattr(value, "dtype", "")))
    return value if target is None else jnp.asarray(value, target)


def _jaxpr(jaxpr: Jaxpr, names: Mapping[str, str]) -> Jaxpr:
    """Returns a jaxpr with every variable, literal and parameter in the other dtypes."""
    env: dict[Any, Any] = {v: _variable(v, names) for v in (*jaxpr.constvars, *jaxpr.invars)}

    def read(atom: Any) -> Any:
        return _literal(atom, names) if isinstance(atom, Literal) else env[atom]

    equations = []
    for equation in jaxpr.eqns:
        other = substituted(equation, names)
        if other is None:
            raise _Meant
        env.update(zip(equation.outvars, other.outvars))
        equations.append(other.replace(invars=[read(a) for a in equation.invars]))
    return jaxpr.replace(
        constvars=[env[v] for v in jaxpr.constvars],
        invars=[env[v] for v in jaxpr.invars],
        outvars=[read(a) for a in jaxpr.outvars],
        eqns=equations,
    )


def _literal(literal: Literal, names: Mapping[str, str]) -> Literal:
    aval: Any = literal.aval
    target = names.get(str(aval.dtype))
    if target is None:
        return literal
    return Literal(np.asarray(literal.val).astype(jnp.dtype(target)), aval.update(dtype=jnp.dtype(target)))


def _variable(v: Any, names: Mapping[str, str]) -> Any:
    target = names.get(str(getattr(v.aval, "dtype", "")))
    return compat.variable(v.aval if target is None else v.aval.update(dtype=jnp.dtype(target)))


def scale(x: Any, dtype: str) -> Any:
    """Returns a float32 power of two s such that x / s fits `dtype` with room: |x / s| ≤ √max(dtype).

    A power of two, so that scaling itself rounds nothing.
    """
    top = jnp.float32(2.0 ** int(np.log2(float(jnp.finfo(dtype).max)) // 2))
    largest = jnp.max(jnp.abs(x.astype(jnp.float32)), initial=jnp.float32(0))
    _, exponent = jnp.frexp(jnp.maximum(largest, jnp.finfo(jnp.float32).tiny) / top)
    return jnp.ldexp(jnp.float32(1), jnp.clip(exponent, -100, 100))
