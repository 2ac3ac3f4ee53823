"""Runs a user's function on tracers once, and turns what can go wrong into words about the user's line."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Var

from autopar.core.errors import TraceError
from autopar.trace import compat
from autopar.trace.arguments import Call, Tree, filled, take_apart

_BRANCHING = (
    jax.errors.TracerBoolConversionError,
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)
_REMEDIES: tuple[tuple[Any, str, str], ...] = (
    (
        jax.errors.TracerBoolConversionError,
        "Python branches on a value that is only known when the step runs",
        "use jax.lax.cond or jnp.where, or make the argument static (static_argnums)",
    ),
    (
        jax.errors.NonConcreteBooleanIndexError,
        "an array is indexed by a mask, so the shape of the result depends on values",
        "use jnp.where(mask, x, 0) or the three-argument jnp.where",
    ),
    (
        jax.errors.TracerIntegerConversionError,
        "a Python integer is wanted where the value is only known when the step runs",
        "make the argument static (static_argnums), or index with jnp.take",
    ),
    (
        jax.errors.TracerArrayConversionError,
        "a numpy function is applied to a value that is only known when the step runs",
        "use the function of the same name in jax.numpy",
    ),
    (
        jax.errors.ConcretizationTypeError,
        "a Python number is wanted where the value is only known when the step runs",
        "make the argument static (static_argnums), or stay in jax.numpy",
    ),
    (
        jax.errors.UnexpectedTracerError,
        "a value of one trace is used in another: the function keeps it in a global or an object",
        "return it as a result and pass it as an argument instead",
    ),
)


@dataclass(frozen=True)
class Staged:
    """A function run once on tracers.

    Attributes:
        closed: its jaxpr: one input per array leaf of the arguments, one output per array leaf of the result.
        result: the result's tree, its array leaves as shapes.
    """

    closed: ClosedJaxpr
    result: Tree


def stage(fun: Callable[..., Any], call: Call, tree: Tree, shapes: Sequence[Any]) -> Staged:
    """Returns the jaxpr of `fun` on arguments of these shapes.

    Args:
        fun: the user's function.
        call: its arguments.
        tree: the dynamic arguments `(args, kwargs)` taken apart.
        shapes: one `ShapeDtypeStruct` per array of `tree`.
    Raises:
        TraceError: Python branches on a traced value, an argument is changed in place, a side effect, a
            result that is no array; the message names the user's line. Other errors pass through.
    """
    results: list[Tree] = []

    def on_leaves(*arrays: Any) -> list[Any]:
        arguments = tree.fill(arrays)
        result = call.apply(fun, *arguments)
        apart = take_apart(
            result, lambda path: f"the result{jax.tree_util.keystr(tuple(path))}", definition(fun)
        )
        _refuse_changes(tree, call, arguments, arrays, apart.arrays, definition(fun))
        results.append(apart)
        return list(apart.arrays)

    try:
        closed, made = jax.make_jaxpr(on_leaves, return_shape=True)(*shapes)
    except tuple(kind for kind, *_ in _REMEDIES) as error:
        raise TraceError(_explained(error)) from error
    _refuse_leaks(closed, fun)
    _refuse_effects(closed)
    apart = results[-1]
    result = Tree(apart.structure, apart.paths, tuple(made), apart.positions, apart.statics)
    return Staged(closed, result)


def _explained(error: Exception) -> str:
    where = failed_at(error)
    for kind, what, remedy in _REMEDIES:
        if isinstance(error, kind):
            return f"{where or 'the function'}: {what}; {remedy}"
    raise AssertionError("only errors of the table come here")


def failed_at(error: BaseException) -> compat.Line | None:
    """Returns the innermost line of the user's that an error came through, None if there is none."""
    frames = [(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
    return compat.innermost(reversed(frames))


def definition(fun: Callable[..., Any]) -> compat.Line | None:
    """Returns where a function is written, None for one that is not written in Python."""
    inner = inspect.unwrap(fun)
    while hasattr(inner, "func"):  # functools.partial
        inner = inner.func
    method = type(inner).__call__ if callable(inner) else None  # an object that is called
    code = getattr(inner, "__code__", None) or getattr(method, "__code__", None)
    return compat.Line(code.co_filename, code.co_firstlineno) if code is not None else None


def _refuse_changes(
    tree: Tree,
    call: Call,
    arguments: Any,
    before: Sequence[Any],
    returned: Sequence[Any],
    where: compat.Line | None,
) -> None:
    """Raises if the function wrote something into its arguments that it does not return: that would be lost,
    as it happens on a copy."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(arguments)
    old = filled(tree.structure, tree.positions, tree.statics, before)
    if structure != jax.tree.structure(old):
        changed = "an argument's structure"
    else:
        kept = {id(x) for x in returned}
        pairs = zip(leaves, jax.tree.leaves(old))
        paths = [path for (path, new), was in pairs if new is not was and id(new) not in kept]
        if not paths:
            return
        changed = call.describe(paths[0])
    raise TraceError(
        f"{where or 'the function'}: it changes {changed} in place; what is written there would be lost. "
        "Return the new value as a result (flax.nnx: nnx.split the module outside, nnx.merge it inside)"
    )


def _refuse_leaks(closed: ClosedJaxpr, fun: Callable[..., Any]) -> None:
    """Raises if a value of another trace is used: JAX takes it for a constant of this one."""
    if not any(isinstance(x, Tracer) for x in closed.consts):
        return
    leaked = {v for v, x in zip(closed.jaxpr.constvars, closed.consts) if isinstance(x, Tracer)}
    at = (e for e in closed.jaxpr.eqns if any(isinstance(a, Var) and a in leaked for a in e.invars))
    where = next(filter(None, map(compat.line_of, at)), None) or definition(fun) or "the function"
    _, what, remedy = next(row for row in _REMEDIES if row[0] is jax.errors.UnexpectedTracerError)
    raise TraceError(f"{where}: {what}; {remedy}")


def _refuse_effects(closed: ClosedJaxpr) -> None:
    for equation in closed.jaxpr.eqns:
        for effect in equation.effects:
            if not compat.is_debug(effect):
                name = equation.primitive.name
                raise TraceError(
                    f"{compat.line_of(equation) or name}: {name} has a side effect ({effect}) that cannot be "
                    "moved to another device or repeated; return the value and do it outside"
                )
