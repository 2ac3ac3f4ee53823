"""Where a layer's backward computes its forward again: not before what reads it.

`jax.checkpoint` evaluates all that is recomputed first, and then goes down the chain of cotangents. In a
layer that ends in a loss over many classes, say, all of its recomputed results would be alive beside the
logits' gradient, though they are read long after it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from jax.extend.core import JaxprEqn, Var

from autopar.trace.compat import Atom, is_recomputed


def sunk(equations: Sequence[JaxprEqn], cotangents: Collection[Atom]) -> list[int]:
    """Returns the equations of a layer's backward in another valid order: what is computed again, with what
    it needs, right before the first other equation that reads it; the others in theirs.

    Args:
        equations: in order. cotangents: what the backward is given beside residuals.

    Returns:
        positions in `equations`, each one once.
    """
    makers: dict[Var, int] = {}
    after = {a for a in cotangents if isinstance(a, Var)}
    for i, equation in enumerate(equations):
        if any(v in after for v in _variables(equation)):
            after.update(equation.outvars)
        elif _again(equation):
            makers.update(dict.fromkeys(equation.outvars, i))
    waiting = {*makers.values()}
    order: list[int] = []
    for i in sorted({*range(len(equations))} - waiting):
        needed = _needed(equations, i, makers, waiting)
        order += [*sorted(needed), i]
        waiting -= needed
    return order + sorted(waiting)


def _again(equation: JaxprEqn) -> bool:
    """Whether an equation is one that is evaluated again, or the barrier in front of such."""
    barrier = equation.primitive.name == "optimization_barrier"
    return (barrier or is_recomputed(equation)) and not equation.effects


def _needed(
    equations: Sequence[JaxprEqn], reader: int, makers: dict[Var, int], waiting: Collection[int]
) -> set[int]:
    """Returns those that wait and on which an equation depends."""
    found: set[int] = set()
    pending = [reader]
    while pending:
        for v in _variables(equations[pending.pop()]):
            i = makers.get(v)
            if i is not None and i in waiting and i not in found:
                found.add(i)
                pending.append(i)
    return found


def _variables(equation: JaxprEqn) -> Iterable[Var]:
    return (a for a in equation.invars if isinstance(a, Var))
