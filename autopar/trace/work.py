"""What an equation costs: its kind and its floating-point operations, from primitive, shapes and rule."""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import ClosedJaxpr, JaxprEqn

from autopar.core.graph import OpKind, Rule
from autopar.trace import compat
from autopar.trace.either import is_either

CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})
VIEWS = frozenset(
    {
        "bitcast_convert_type",
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "copy_p",
        "expand_dims",
        "iota",
        "optimization_barrier",
        "random_unwrap",
        "random_wrap",
        "reduce_precision",
        "reshape",
        "sharding_constraint",
        "split",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)
_INDEXED = frozenset({"dynamic_slice", "dynamic_update_slice", "gather", "scatter"})
_WRITES = frozenset(
    {"random_bits", "random_gamma", "random_split", "while", "cond"}
)  # their rules look elementwise


def kind(equation: JaxprEqn, rule: Rule | None) -> OpKind:
    """Returns what an equation costs; elementwise is what has a rule that leaves every dim where it is."""
    name = equation.primitive.name
    if name == "scan":
        return OpKind.LOOP
    if is_either(equation):
        return OpKind.EITHER
    if rule is None:
        return OpKind.OPAQUE
    if name in CONTRACTIONS:
        return OpKind.CONTRACTION
    if name in VIEWS:
        return OpKind.VIEW
    if name in _INDEXED:
        return OpKind.INDEXED
    return OpKind.FUSED if name not in _WRITES and _is_elementwise(rule) else OpKind.MEMORY


def _is_elementwise(rule: Rule) -> bool:
    if rule.reductions or rule.fixed or not rule.results:
        return False
    dims = rule.results[0]
    operands = [t for t in rule.operands if t]  # a dim of size 1 has no factor and is broadcast
    broadcast = all(len(t) == len(dims) and all(d in (e, ()) for d, e in zip(t, dims)) for t in operands)
    return broadcast and all(t == dims for t in rule.results)


def flops(equation: JaxprEqn) -> float:
    """Returns the floating-point operations of one equation.

    2 per multiply-add of a product; 1 per element made by an elementwise operation or read by a reduction;
    0 for what only moves data. A scan counts its body `length` times, a while once, a cond its costliest
    branch.
    """
    name = equation.primitive.name
    if name in ("dot_general", "ragged_dot_general"):
        return 2.0 * _size(equation.outvars[0]) * _contracted(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    scan = compat.scan_of(equation)
    if scan is not None:
        return scan.length * total_flops(scan.body)
    inner = [total_flops(jaxpr) for jaxpr in compat.inner_jaxprs(equation)]
    if inner:
        return max(inner) if name == "cond" else sum(inner)
    if name in VIEWS:
        return 0.0
    operands = sum(_size(v) for v in equation.invars)
    results = sum(_size(v) for v in equation.outvars)
    return float(max(operands, results) if name.startswith(("reduce", "arg", "cum", "sort")) else results)


def total_flops(closed: ClosedJaxpr) -> float:
    """Returns the floating-point operations of all equations of a jaxpr."""
    return sum(flops(e) for e in closed.jaxpr.eqns)


def contraction_flops(equation: JaxprEqn) -> float:
    """Returns the floating-point operations of an equation's products, those inside a scan included."""
    if equation.primitive.name in CONTRACTIONS:
        return flops(equation)
    scan = compat.scan_of(equation)
    times = scan.length if scan is not None else 1
    return times * sum(contraction_flops(e) for j in compat.inner_jaxprs(equation) for e in j.jaxpr.eqns)


def _contracted(equation: JaxprEqn) -> int:
    params = equation.params
    numbers = params.get("dimension_numbers")
    if numbers is None:
        numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    (lhs_dims, _), _ = numbers
    shape = _shape(equation.invars[0])
    return math.prod(shape[d] for d in lhs_dims)


def _convolution(equation: JaxprEqn) -> float:
    # From shapes, because Shardy's rules say 1 for the window. A dilated input is mostly zeros.
    params = equation.params
    kernel = _shape(equation.invars[1])
    window = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * _size(equation.outvars[0]) * window / math.prod(params["lhs_dilation"])


def nbytes(aval: Any) -> int:
    """Returns the bytes of a value; nothing for what is no array."""
    dtype = getattr(aval, "dtype", None)
    return math.prod(aval.shape) * getattr(dtype, "itemsize", 0)


def _shape(atom: Any) -> tuple[int, ...]:
    return tuple(getattr(atom.aval, "shape", ()))


def _size(atom: Any) -> int:
    return math.prod(_shape(atom))
