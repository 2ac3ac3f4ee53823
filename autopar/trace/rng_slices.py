"""Random numbers of a micro-batch that are those of the full batch: draw all, keep its slice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

from autopar.trace import compat
from autopar.trace.flat import Builder, Flat, Mark, dce, flatten, inline
from autopar.trace.forward_layers import expand_gradients
from autopar.trace.grad_equation import GRAD
from autopar.trace.held_function import function_of, with_function
from autopar.trace.rename import keep_names

_DRAWS = frozenset({"random_bits", "random_split"})
_REMAT = frozenset({"remat2", "remat", "checkpoint"})


def slice_rng(micro: Flat, full: Flat, m: int) -> Flat:
    """Returns the micro-batch's step with one more input, its index, drawing the full batch's random numbers.

    Where a random draw has a dim that grows with the batch, the full batch's draw is made and the
    micro-batch's slice of it kept: with every backend that costs m draws per micro-batch, and makes dropout
    equal to the single device's. Draws inside of scan, rematerialised functions and the function of a
    gradient equation are found as well.

    Args:
        micro: the step traced with one micro-batch.
        full: the same with the full batch, equation for equation.
        m: how many micro-batches.
    Returns:
        A Flat with the inputs of `micro` followed by an int32 scalar, 0 … m − 1. All other variables stay
        the same.
    Raises:
        NotImplementedError: a draw per example inside while, cond or a function with a custom derivative.
    """
    return _sliced(expand_gradients(micro, top=False), expand_gradients(full, top=False), m)


def draws_per_example(micro: Flat, full: Flat) -> bool:
    """Returns whether any random draw has a dim that grows with the batch."""
    return any(_differs(a, b) for a, b in zip(micro.equations, full.equations))


def _differs(micro: JaxprEqn, full: JaxprEqn) -> bool:
    """Returns whether an equation, or one inside of it, draws per example from a key they share."""
    if micro.primitive.name in _DRAWS:
        keys = [_shape(a) for a in micro.invars] == [_shape(a) for a in full.invars]
        return keys and _shape(micro.outvars[0]) != _shape(full.outvars[0])
    inner = zip(compat.inner_jaxprs(micro), compat.inner_jaxprs(full))
    return any(_differs(a, b) for x, y in inner for a, b in zip(x.jaxpr.eqns, y.jaxpr.eqns))


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(atom.aval.shape)


def _sliced(micro: Flat, full: Flat, m: int) -> Flat:
    index = compat.variable(jax.typeof(np.int32(0)))
    same = [e.primitive for e in micro.equations] == [e.primitive for e in full.equations]
    assert same, "analyse compares the two traces first"
    builder = Builder(constants=list(micro.constants))
    for equation, whole, mark in zip(micro.equations, full.equations, micro.marks):
        if not _differs(equation, whole):
            builder.add(equation, mark)
        elif equation.primitive.name in _DRAWS:
            drawn = [compat.variable(v.aval) for v in whole.outvars]
            builder.add(equation.replace(outvars=drawn, params=whole.params), mark)
            for v, all_of_it in zip(equation.outvars, drawn):
                _add_slice(builder, v, all_of_it, index, equation, mark)
        elif compat.scan_of(equation) is not None:
            _add_scan(builder, equation, whole, m, index, mark)
        else:
            builder.add(_with_index(builder, equation, whole, m, index), mark)
    return builder.flat([*micro.inputs, index], micro.outputs)


def _add_slice(builder: Builder, v: Any, whole: Var, index: Var, like: JaxprEqn, mark: Mark) -> None:
    sizes = _shape(v)
    (dim,) = (d for d, (a, b) in enumerate(zip(sizes, _shape(whole))) if a != b)
    (start,) = builder.bind(lax.mul_p, [index, _int32(sizes[dim])], [index.aval], {}, mark, like)
    starts = [start if d == dim else _int32(0) for d in range(len(sizes))]
    builder.bind(lax.dynamic_slice_p, [whole, *starts], [v.aval], {"slice_sizes": sizes}, mark, like)
    builder.equations[-1] = builder.equations[-1].replace(outvars=[v])


def _int32(value: int) -> Literal:
    return Literal(np.int32(value), jax.typeof(np.int32(0)))


def _with_index(builder: Builder, equation: JaxprEqn, whole: JaxprEqn, m: int, index: Var) -> JaxprEqn:
    """Returns an equation that holds a function, with the index as one more operand and its draws sliced."""
    name = equation.primitive.name
    if equation.primitive is GRAD:
        function = _sliced(function_of(equation), function_of(whole), m)
        return with_function(builder, equation, function, [*equation.invars, index], equation.params["wrt"])
    if name not in _REMAT:
        raise NotImplementedError(
            f"{compat.line_of(equation) or name}: random numbers per example are drawn inside {name}; "
            "draw them before it, or use micro_batches=1"
        )
    held, other = compat.closed(equation.params["jaxpr"]), compat.closed(whole.params["jaxpr"])
    inner, constants = _inner(held, other, m)
    operands = [*equation.invars, index, *(builder.constant(v.aval, value) for v, value in constants)]
    return equation.replace(invars=operands, params={**equation.params, "jaxpr": inner.jaxpr})


def _inner(micro: ClosedJaxpr, full: ClosedJaxpr, m: int) -> tuple[ClosedJaxpr, Sequence[tuple[Var, Any]]]:
    """Returns a function with further inputs (the index, what it captured), and what it captured."""
    flat, whole = (dce(flatten(c, keep=compat.DIFFERENTIABLE)) for c in (micro, full))
    sliced = _sliced(flat, whole, m)
    inputs = [*sliced.inputs, *(v for v, _ in sliced.constants)]
    jaxpr = compat.make_jaxpr(inputs, sliced.outputs, sliced.equations)
    return ClosedJaxpr(jaxpr, ()), sliced.constants


def _add_scan(builder: Builder, equation: JaxprEqn, whole: JaxprEqn, m: int, index: Var, mark: Mark) -> None:
    """Adds a scan whose body reads the index, which is the same in every trip."""
    scan, other = compat.scan_of(equation), compat.scan_of(whole)
    assert scan is not None and other is not None
    body, constants = _inner(scan.body, other.body, m)
    operands = [*equation.invars, index, *(builder.constant(v.aval, value) for v, value in constants)]
    count, ends = len(equation.invars), (scan.consts, scan.consts + scan.carries)

    def looped(*values: Any) -> list[Any]:
        consts, first, scanned = values[: ends[0]], values[ends[0] : ends[1]], values[ends[1] : count]

        def trip(carries: Any, slices: Any) -> Any:
            results = jaxpr_as_fun(body)(*consts, *carries, *slices, *values[count:])
            return tuple(results[: scan.carries]), tuple(results[scan.carries :])

        last, stacked = lax.scan(trip, first, scanned, scan.length, scan.reverse, scan.unroll)
        return [*last, *stacked]

    # Traced anew, because the form of a scan's parameters depends on the version of JAX.
    start = len(builder.equations)
    results = inline(builder, jax.make_jaxpr(looped)(*(a.aval for a in operands)), operands, mark)
    left = keep_names(builder, start, results, equation.outvars)
    assert not left, "a scan's results are its own"
    for i in range(start, len(builder.equations)):
        builder.equations[i] = builder.equations[i].replace(source_info=equation.source_info)
