"""How operations act on tags: sums and powers of the number of micro-batches, without regard to dims."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.trace.batch_tags import SAME, Kind, Tag, term

LINEAR = frozenset(
    {
        "add", "add_any", "autopar_layer_boundary", "broadcast_in_dim", "concatenate", "conj",
        "convert_element_type", "copy", "copy_p", "cumsum", "dynamic_slice", "dynamic_update_slice",
        "expand_dims", "gather", "imag", "neg", "optimization_barrier", "pad", "real", "reduce_precision",
        "reduce_sum", "reduce_window_sum", "reshape", "rev", "scatter", "scatter-add", "scatter_add",
        "select_n", "sharding_constraint", "slice", "split", "squeeze", "stop_gradient", "sub", "transpose",
        "select_and_scatter_add",
    }
)  # fmt: skip
"""f(a + b) = f(a) + f(b) in the operands that are data, all together."""

PRODUCTS = frozenset({"mul", "dot_general", "conv_general_dilated", "ragged_dot_general"})
"""Linear in each operand while the others stand still."""

SUMS = PRODUCTS - {"mul"} | {"reduce_sum", "scatter-add", "scatter_add", "reduce_window_sum"}
"""What sums over a factor that Shardy calls reduced."""

_CONTROLS = {"select_n": (0,), "gather": (1,), "scatter": (1,), "scatter-add": (1,), "scatter_add": (1,)}


def controls(op: str, count: int) -> tuple[int, ...]:
    """Returns the positions of operands that choose (indices, predicates) instead of being data."""
    if op == "dynamic_slice":
        return tuple(range(1, count))
    if op == "dynamic_update_slice":
        return tuple(range(2, count))
    return _CONTROLS.get(op, ())


def power(op: str, tags: Sequence[Tag], y: int | None) -> int | str:
    """Returns the exponent of m of the result of values with these tags, or why it has none.

    Args:
        op: the operation. tags: of its operands, none MIXED. y: the exponent of an integer power, else None.
    """
    chosen = controls(op, len(tags))
    if any(tags[i].exponent for i in chosen):
        return "an index or a condition depends on the batch size"
    data = [t for i, t in enumerate(tags) if i not in chosen]
    if op in PRODUCTS:
        return sum(t.exponent for t in data)
    if op == "div":
        return data[0].exponent - data[1].exponent
    if op in ("integer_pow", "square"):
        return data[0].exponent * (2 if y is None else y)
    exponents = {t.exponent for t in data if not t.zero}
    if op in LINEAR and len(exponents) <= 1:
        return exponents.pop() if exponents else 0
    if exponents <= {0}:
        return 0
    if op in LINEAR:
        return "it adds values that depend on the batch size in different ways"
    return "it is not linear in a value that depends on the batch size"


def of_terms(op: str, tags: Sequence[Tag]) -> Tag | str:
    """Returns the tag of the results where some operand is a TERM and none a PIECE, or why there is none."""
    chosen = controls(op, len(tags))
    if any(tags[i].kind is Kind.TERM for i in chosen):
        return "an index or a condition is a sum over examples"
    data = [t for i, t in enumerate(tags) if i not in chosen]
    terms = [t for t in data if t.kind is Kind.TERM]
    if op in PRODUCTS or op == "div":
        if len(terms) > 1 or (op == "div" and data[1].kind is Kind.TERM):
            return "it multiplies or divides by a sum over examples"
        exponent = power(op, tags, None)
        assert isinstance(exponent, int)
        return term(exponent)
    if op not in LINEAR:
        return "it is not linear in a sum over examples"
    # m equal values are a mean of themselves: SAME with exponent e is TERM with exponent e − 1.
    exponents = {t.exponent - (t.kind is Kind.SAME) for t in data if not t.zero}
    if len(exponents) > 1:
        return "it adds a sum over examples to something that is not summed over the same ones"
    return term(exponents.pop())


def is_zero(op: str, tags: Sequence[Tag]) -> bool:
    """Returns whether the results are exactly zero because the operands are."""
    data = [t for i, t in enumerate(tags) if i not in controls(op, len(tags))]
    return bool(data) and op in LINEAR and all(t.zero for t in data)


def literal(full: float, micro: float, m: int) -> Tag | None:
    """Returns the tag of a constant written into both traces, None if they are not a power of m apart."""
    if full == micro or (full != full and micro != micro):
        return SAME if full != 0 else Tag(Kind.SAME, zero=True)
    if micro == 0 or full == 0:
        return None
    ratio, exponent = full / micro, 0
    while abs(ratio) > 1.5 and exponent < 8:
        ratio, exponent = ratio / m, exponent + 1
    while abs(ratio) < 0.75 and exponent > -8:
        ratio, exponent = ratio * m, exponent - 1
    return SAME.scaled(exponent) if abs(ratio - 1) < 1e-5 else None
