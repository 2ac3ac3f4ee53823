"""Equations that treat what is stacked along dim 0 one by one, and the same equations on a piece of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
from jax.extend.core import JaxprEqn, Literal, Primitive, Var

from autopar.core.graph import Dims, Rule
from autopar.trace import compat

SUMMED: dict[str, Primitive] = {
    "reduce_sum": lax.add_p,
    "reduce_max": lax.max_p,
    "reduce_min": lax.min_p,
    "reduce_and": lax.and_p,
    "reduce_or": lax.or_p,
    "dot_general": lax.add_p,
}
"""How the partial results of an operation that reduces the stack become one."""

_SHAPES = ("shape", "new_sizes", "limit_indices", "slice_sizes", "sizes")


def leading(dims: Dims | None) -> int | None:
    """Returns the major factor of dim 0, None for a scalar."""
    return dims[0][0] if dims and dims[0] else None


def groups(equation: JaxprEqn, rule: Rule | None, length: int | None) -> list[list[Var]]:
    """Returns the variables of an equation that are stacked along the same factor, in groups of two and more.

    Args:
        equation: any. rule: its factor rule. length: of the stack; None: any.
    """
    if rule is None:
        return []
    found: dict[int, list[Var]] = defaultdict(list)
    for atom, dims in zip((*equation.invars, *equation.outvars), (*rule.operands, *rule.results)):
        factor = leading(dims)
        if factor is None or factor in rule.fixed or isinstance(atom, Literal):
            continue
        if length is None or (rule.sizes[factor] % length == 0 and atom.aval.shape[0] % length == 0):  # type: ignore[attr-defined]
            found[factor].append(atom)
    return [g for g in found.values() if len(g) > 1]


def on_pieces(equation: JaxprEqn, rule: Rule | None, cut: Sequence[bool], length: int) -> list[bool] | None:
    """Returns which results of an equation are pieces when operands are; the others are partial.

    Args:
        equation: any but those that hold jaxprs. rule: its factor rule.
        cut: which operands are known in pieces along dim 0.
        length: of the stack.
    Returns:
        None where the equation cannot be done piece by piece.
    """
    if rule is None:
        return None
    factors = {leading(dims) for dims, c in zip(rule.operands, cut) if c}
    if len(factors) != 1:
        return None
    (factor,) = factors
    if factor is None or factor in rule.fixed or rule.sizes[factor] % length:
        return None
    if any(_elsewhere(dims, factor) for dims in (*rule.operands, *rule.results)):
        return None
    kept = [leading(dims) == factor for dims in rule.results]
    if all(kept) or (not any(kept) and factor in rule.reductions and equation.primitive.name in SUMMED):
        return kept
    return None


def stacked_operands(rule: Rule, cut: Sequence[bool]) -> list[bool]:
    """Returns which operands are stacked along the factor along which some are cut."""
    factor = next(leading(dims) for dims, c in zip(rule.operands, cut) if c)
    return [leading(dims) == factor for dims in rule.operands]


def _elsewhere(dims: Dims | None, factor: int) -> bool:
    """Returns whether a factor occurs anywhere but as the major one of dim 0."""
    return any(f == factor and (d, i) != (0, 0) for d, fs in enumerate(dims or ()) for i, f in enumerate(fs))


def piece_of(aval: Any, part: int, length: int) -> Any:
    """Returns the abstract value of `part` of `length` parts of a stack."""
    return aval.update(shape=(aval.shape[0] * part // length, *aval.shape[1:]))


def on_piece(
    equation: JaxprEqn, operands: Sequence[Any], kept: Sequence[bool], part: int, length: int
) -> JaxprEqn | None:
    """Returns the equation on one piece, None if the operation does not take that.

    Args:
        equation: on the whole stack. operands: of the piece. kept: which results are pieces.
        part: layers in this piece. length: layers in all.
    """
    results = [
        compat.variable(piece_of(v.aval, part, length) if k else v.aval)
        for v, k in zip(equation.outvars, kept)
    ]
    whole = equation.outvars[0].aval.shape[:1] if kept[0] else ()  # type: ignore[attr-defined]
    params = {k: _shrunk(v, whole, part, length) if k in _SHAPES else v for k, v in equation.params.items()}
    smaller = equation.replace(invars=list(operands), outvars=results, params=params)
    shapes = [
        jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in operands if not isinstance(a, Literal)
    ]
    try:
        made = jax.eval_shape(lambda *x: compat.evaluate(smaller, x), *shapes)
    except (TypeError, ValueError):
        return None
    right = [(v.aval.shape, v.aval.dtype) for v in results] == [(s.shape, s.dtype) for s in made]  # type: ignore[attr-defined]
    return smaller if right else None


def _shrunk(shape: Any, whole: tuple[int, ...], part: int, length: int) -> Any:
    if not isinstance(shape, tuple) or not whole or shape[:1] != whole:
        return shape
    return (shape[0] * part // length, *shape[1:])
