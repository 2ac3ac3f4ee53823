"""Which elementwise operations are too dear to be computed again by every kernel that reads them."""

from __future__ import annotations

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

COSTLY = frozenset(
    {
        *("exp", "exp2", "expm1", "log", "log1p", "pow", "sqrt", "rsqrt", "cbrt", "logistic"),
        *("sin", "cos", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "tanh"),
        *("asinh", "acosh", "atanh", "erf", "erfc", "erf_inv", "digamma", "lgamma", "igamma", "igammac"),
        *("bessel_i0e", "bessel_i1e", "regularized_incomplete_beta"),
    }
)


def costly(equation: JaxprEqn) -> bool:
    """Returns whether XLA keeps an operation's result for several readers rather than compute it again.

    Transcendental functions, and division and remainder of floats (XLA's `InstructionFusion::IsExpensive`).
    """
    name = equation.primitive.name
    if name in ("div", "rem"):
        return bool(jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.inexact))  # type: ignore[attr-defined]
    return name in COSTLY
