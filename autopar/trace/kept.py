"""What the backward pass of a gradient equation keeps from its forward, told before it is differentiated."""

from __future__ import annotations

from jax.extend.core import JaxprEqn, Literal, Var

from autopar.trace.forward_layers import forward_of
from autopar.trace.work import CONTRACTIONS, VIEWS, nbytes

_LINEAR = frozenset(
    {"add", "add_any", "sub", "neg", "concatenate", "cumsum", "dynamic_slice", "gather", "pad"}
    | {"reduce_sum", "rev", "select_n", "slice"}
)
_SCALING = frozenset({"mul", "div"})


def kept_bytes(equation: JaxprEqn) -> int:
    """Returns bytes of the products in the forward of a gradient equation that its backward pass needs.

    A product is needed if something that is not linear reads it, directly or through sums and views: that
    operation's derivative depends on it. What is elementwise could be computed again from products and is not
    counted, nor is what a loop keeps, so that this is the least to expect.
    """
    needed: set[Var] = set()
    total = 0
    for e in reversed(forward_of(equation).flat.equations):
        if e.primitive.name in CONTRACTIONS:
            total += sum(nbytes(v.aval) for v in e.outvars if v in needed)
        if not _passes(e) or needed.intersection(e.outvars):
            needed.update(a for a in e.invars if isinstance(a, Var))
    return total


def _passes(equation: JaxprEqn) -> bool:
    """Whether the derivative does not depend on the operands: views, sums, products with a number."""
    name = equation.primitive.name
    if name in _SCALING:
        return isinstance(equation.invars[1], Literal) or (
            name == "mul" and isinstance(equation.invars[0], Literal)
        )
    return name in _LINEAR or name in VIEWS
