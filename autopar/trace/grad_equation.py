"""`value_and_grad` and `grad` that leave one equation holding the function they differentiate, so that
autopar can cut it first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from autopar.trace import compat

GRAD = Primitive("autopar_grad")
"""Operands → results of `jaxpr` (the loss first), then the loss's gradient for the operands at positions
`wrt`.

Parameters:
    jaxpr: the function, a ClosedJaxpr without constants.
    wrt: positions of the operands to differentiate for.
    name: of the user's function.
    layers: per equation of `jaxpr` a layer's name or None, where a pass has cut it already; None when no pass
    has.
"""
GRAD.multiple_results = True


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[..., Any]:
    """Returns a function that returns `fun`'s value and its gradient, a drop-in for `jax.value_and_grad`.

    Under `autopar.parallelize` (or any `jax.jit`) it leaves a single equation in the trace that holds `fun`
    itself, so that `fun` can be cut into layers before it is differentiated. Called outside of a trace it is
    `jax.value_and_grad`.

    Args:
        fun: returns a real scalar, or `(scalar, aux)` when `has_aux`. Its other arguments, positional or by
            keyword, may be anything.
        argnums: which positional arguments to differentiate for (pytrees of real or complex arrays).
        has_aux: whether `fun` returns a pair.
        holomorphic: not offered here; use `jax.value_and_grad`.
        allow_int: not offered here; use `jax.value_and_grad`.
    Returns:
        A function `(*args, **kwargs) → (value, gradient)`, or `((value, aux), gradient)` when `has_aux`; the
        gradient has the shape of the argument, or is a tuple of such when `argnums` is a sequence.
    Raises:
        NotImplementedError: for `holomorphic` or `allow_int`.
        TypeError: as `jax.value_and_grad` does, for arguments and results it cannot differentiate.
    """
    if holomorphic or allow_int:
        option = "holomorphic" if holomorphic else "allow_int"
        raise NotImplementedError(
            f"autopar.value_and_grad has no {option}=True; use jax.value_and_grad or jax.grad"
        )
    plain = jax.value_and_grad(fun, argnums, has_aux)
    wanted = (argnums,) if isinstance(argnums, int) else tuple(argnums)

    @functools.wraps(fun)
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        if not _staging():
            return plain(*args, **kwargs)
        in_range = all(-len(args) <= n < len(args) for n in wanted)
        answer = _leave_equation(fun, wanted, has_aux, args, kwargs) if in_range else None
        if answer is None:
            return plain(*args, **kwargs)  # which raises JAX's own error
        value, aux, gradients = answer
        return ((value, aux) if has_aux else value), (gradients[0] if isinstance(argnums, int) else gradients)

    return differentiated


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    holomorphic: bool = False,
    allow_int: bool = False,
) -> Callable[..., Any]:
    """Returns a function that returns `fun`'s gradient, a drop-in for `jax.grad`; see `value_and_grad`.

    Returns:
        A function `(*args, **kwargs) → gradient`, or `(gradient, aux)` when `has_aux`.
    """
    both = value_and_grad(fun, argnums, has_aux, holomorphic, allow_int)

    @functools.wraps(fun)
    def gradient_only(*args: Any, **kwargs: Any) -> Any:
        value, gradient = both(*args, **kwargs)
        return (gradient, value[1]) if has_aux else gradient

    return gradient_only


def _staging() -> bool:
    # Whatever is computed while a jaxpr is being recorded is a tracer, even a constant: JAX's "omnistaging".
    return isinstance(lax.full((), 0, np.int32), Tracer)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)


def _is_inexact(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(jax.typeof(leaf).dtype, np.inexact)


def _leave_equation(
    fun: Callable[..., Any], wanted: Sequence[int], has_aux: bool, args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[Any, Any, tuple[Any, ...]] | None:
    """Returns (value, aux, gradient per wanted argument) through one GRAD equation; None for what JAX would
    refuse.
    """
    wanted = [n % len(args) for n in wanted]
    leaves, tree = jax.tree.flatten(tuple(args[n] for n in wanted))
    if not all(map(_is_inexact, leaves)):
        return None
    aux_forms: list[tuple[Any, list[tuple[Any, ...] | None]]] = []

    def of_leaves(*leaves: Any) -> list[Any]:
        full = list(args)
        for n, value in zip(wanted, jax.tree.unflatten(tree, leaves)):
            full[n] = value
        answer = fun(*full, **kwargs)
        loss, aux = answer if has_aux else (answer, None)
        aux_leaves, aux_tree = jax.tree.flatten(aux)
        # Strings and the like stay outside of the jaxpr: None marks the place of an array.
        aux_forms.append((aux_tree, [None if hasattr(x, "dtype") else (x,) for x in aux_leaves]))
        return [loss, *(x for x in aux_leaves if hasattr(x, "dtype"))]

    traced = jax.make_jaxpr(of_leaves)(*leaves)
    loss = traced.out_avals[0]
    if loss.shape != () or not jnp.issubdtype(loss.dtype, np.floating):
        return None
    # What the function closes over (the batch, other arguments) arrived as constants: it becomes operands.
    jaxpr, count = traced.jaxpr, len(traced.consts)
    name = getattr(fun, "__name__", type(fun).__name__)
    opened = compat.make_jaxpr([*jaxpr.constvars, *jaxpr.invars], jaxpr.outvars, jaxpr.eqns, name)
    wrt = tuple(range(count, count + len(leaves)))
    results = GRAD.bind(
        *traced.consts, *leaves, jaxpr=ClosedJaxpr(opened, ()), wrt=wrt, name=name, layers=None
    )
    made = iter(results[1 : len(traced.out_avals)])
    aux_tree, places = aux_forms[-1]
    aux = jax.tree.unflatten(aux_tree, [next(made) if x is None else x[0] for x in places])
    return results[0], aux, jax.tree.unflatten(tree, results[len(traced.out_avals) :])


def as_jax_would(*operands: Any, jaxpr: ClosedJaxpr, wrt: tuple[int, ...], **_: Any) -> list[Any]:
    """Returns the results of a GRAD equation, differentiated by JAX as a whole."""
    fun = jaxpr_as_fun(jaxpr)

    def loss_of(wanted: Sequence[Any]) -> tuple[Any, list[Any]]:
        full = list(operands)
        for i, value in zip(wrt, wanted):
            full[i] = value
        loss, *aux = fun(*full)
        return loss, aux

    (loss, aux), gradients = jax.value_and_grad(loss_of, has_aux=True)([operands[i] for i in wrt])
    return [loss, *aux, *gradients]


_compiled = jax.jit(as_jax_would, static_argnames=("jaxpr", "wrt", "name", "layers"))
GRAD.def_impl(_compiled)


def _abstract(*operands: Any, jaxpr: ClosedJaxpr, wrt: tuple[int, ...], **_: Any) -> tuple[list[Any], Any]:
    return [*jaxpr.out_avals, *(operands[i] for i in wrt)], jaxpr.effects


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    filled = [ad.instantiate_zeros(t) for t in tangents]
    return jax.jvp(functools.partial(as_jax_would, **params), tuple(primals), tuple(filled))


def _batch(operands: Sequence[Any], axes: Sequence[Any], **params: Any) -> tuple[list[Any], list[int]]:
    results = jax.vmap(functools.partial(as_jax_would, **params), in_axes=tuple(axes))(*operands)
    return results, [0] * len(results)


GRAD.def_effectful_abstract_eval(_abstract)
ad.primitive_jvps[GRAD] = _jvp
batching.primitive_batchers[GRAD] = _batch
mlir.register_lowering(GRAD, mlir.lower_fun(as_jax_would, multiple_results=True))
