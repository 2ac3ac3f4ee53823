"""Evaluates captured equations one by one, on arrays or tracers, in the captured or in other dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import JaxprEqn, Literal

from autopar.core.graph import OpKind
from autopar.trace import compat, dtypes
from autopar.trace.traced import Traced

Body = Callable[[Sequence[Any]], Sequence[Any]]
"""A loop's body: consts, carries and slices of the scanned arrays → carries and what is to be stacked."""

_SAME: Mapping[str, str] = {}


def fences(traced: Traced) -> frozenset[int]:
    """Returns the equations that only keep what follows from being moved before them, as in front of what is
    computed again."""
    named = (i for i, e in enumerate(traced.equations) if e.primitive.name == "optimization_barrier")
    return frozenset(named)


def product_of(traced: Traced, index: int) -> Any:
    """Returns the dimension numbers of a `lax.dot_general` of one dtype, None of any other equation."""
    equation = traced.equations[index]
    if equation.primitive.name != "dot_general":
        return None
    avals: list[Any] = [x.aval for x in (*equation.invars, *equation.outvars)]
    kinds = {aval.dtype for aval in avals}
    return equation.params["dimension_numbers"] if len(kinds) == 1 else None


def bind(
    traced: Traced,
    index: int,
    operands: Sequence[Any],
    *,
    dtypes: Mapping[str, str] = _SAME,
    products: Mapping[str, str] = _SAME,
) -> list[Any]:
    """Returns the results of one equation.

    Args:
        traced: where it is.
        index: which equation.
        operands: values of its non-literal inputs, in the dtypes that `dtypes` makes of theirs.
        dtypes: what a device without some dtype keeps such values in: {"bfloat16": "float32"}. Literals and
            parameters that name a dtype are rewritten; what means the bits of a dtype is bound as captured.
        products: for matrix products and convolutions of the captured dtype, the dtype to multiply in:
            {"bfloat16": "float16"}. Operands are scaled to use its range, sums are kept in float32.
    """
    equation = traced.equations[index]
    node = traced.graph.equations[index]
    if node.kind is OpKind.LOOP:
        body = traced.bodies[index]
        return bind_loop(traced, index, operands, lambda xs: run(body, xs, dtypes=dtypes, products=products))
    if node.kind is OpKind.CONTRACTION and products:
        product = _product_dtype(equation, products)
        if product is not None:
            return _scaled_product(equation, operands, product, dtypes)
    return _plain(equation, operands, dtypes)


def run(
    traced: Traced,
    inputs: Sequence[Any],
    *,
    dtypes: Mapping[str, str] = _SAME,
    products: Mapping[str, str] = _SAME,
) -> list[Any]:
    """Returns what the captured function returns, one array per output, by binding all equations in order.

    Args:
        traced: the function.
        inputs: one array per `graph.inputs`.
        dtypes, products: as for `bind`.
    """
    graph = traced.graph
    known = dict(zip(graph.inputs, inputs, strict=True))
    known |= {v: _as(array, dtypes) for v, array in traced.constants.items()}
    for i, node in enumerate(graph.equations):
        results = bind(traced, i, [known[v] for v in node.operands], dtypes=dtypes, products=products)
        known.update(zip(node.outputs, results, strict=True))
    literals = (leaf.literal for leaf in traced.out_leaves if not leaf.values)
    return [next(literals) if v is None else known[v] for v in graph.outputs]


def bind_loop(traced: Traced, index: int, operands: Sequence[Any], body: Body) -> list[Any]:
    """Returns the results of a scan equation whose body is `body`.

    Args:
        traced: where it is.
        index: which equation.
        operands: values of its non-literal inputs: consts, initial carries, scanned arrays.
        body: takes a list of consts, carries and slices, returns carries and slices of results. It may
            constrain them, but not change their dtypes from one trip to the next.
    """
    equation = traced.equations[index]
    scan = compat.scan_of(equation)
    assert scan is not None, "bind_loop is for scans"
    values = _with_literals(equation, operands)
    consts, rest = values[: scan.consts], values[scan.consts :]
    carries, scanned = rest[: scan.carries], rest[scan.carries :]

    def step(carry: Sequence[Any], slices: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        results = list(body([*consts, *carry, *slices]))
        after = [_like(new, old) for new, old in zip(results, carry)]
        return after, results[scan.carries :]

    final, stacked = lax.scan(
        step, list(carries), list(scanned), length=scan.length, reverse=scan.reverse, unroll=scan.unroll
    )
    return [*final, *stacked]


def _like(new: Any, old: Any) -> Any:
    return new if new.dtype == old.dtype else lax.convert_element_type(new, old.dtype)


def _with_literals(equation: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    supply = iter(operands)
    return [a.val if isinstance(a, Literal) else next(supply) for a in equation.invars]


def _as(array: Any, names: Mapping[str, str]) -> Any:
    target = names.get(str(array.dtype))
    return array if target is None else lax.convert_element_type(array, target)


def _plain(equation: JaxprEqn, operands: Sequence[Any], names: Mapping[str, str]) -> list[Any]:
    if not names or not dtypes.mentions(equation, names):
        return compat.evaluate(equation, operands)
    other = dtypes.substituted(equation, names)
    if other is not None:
        return compat.evaluate(other, operands)
    # Its meaning is in the dtype's own bits (a bitcast): compute it as captured and convert the results.
    avals: list[Any] = [a.aval for a in equation.invars if not isinstance(a, Literal)]
    back = [_to(x, a.dtype) for x, a in zip(operands, avals)]
    return [_as(r, names) for r in compat.evaluate(equation, back)]


def _to(x: Any, dtype: Any) -> Any:
    return x if x.dtype == dtype else lax.convert_element_type(x, dtype)


def _product_dtype(equation: JaxprEqn, products: Mapping[str, str]) -> str | None:
    avals: list[Any] = [a.aval for a in equation.invars[:2]]
    found = {products.get(str(a.dtype)) for a in avals}
    return found.pop() if len(found) == 1 else None


def _scaled_product(
    equation: JaxprEqn, operands: Sequence[Any], product: str, names: Mapping[str, str]
) -> list[Any]:
    """Returns a contraction of operands scaled into the range of `product`, accumulated in float32."""
    values = _with_literals(equation, operands)
    scales = [dtypes.scale(x, product) for x in values[:2]]
    narrow = [lax.convert_element_type(x * (1 / s), product) for x, s in zip(values[:2], scales)]
    params = {**equation.params, "preferred_element_type": jax.numpy.dtype("float32"), "precision": None}
    wide = compat.evaluate(
        compat.with_operands(equation, [*narrow, *values[2:]], params), [*narrow, *values[2:]]
    )[0]
    out: Any = equation.outvars[0].aval
    result = wide * (scales[0] * scales[1])
    return [_to(result, names.get(str(out.dtype), str(out.dtype)))]
