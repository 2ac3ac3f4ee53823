"""Where a layer is narrow: between its parts, no more passes than the layer itself leaves to others.

A block that adds attention and then a feed-forward layer to what it reads has one such place, between the
two. What passes there, kept, spares the backward of one part what is computed again for the other: each part
has the memory to itself (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jax.extend.core import JaxprEqn, Var

from autopar.trace.work import contraction_flops, nbytes


def parts(equations: Sequence[JaxprEqn], outputs: Sequence[Var]) -> list[int]:
    """Returns the part of every equation of a layer, counted from 0: as many parts as there are narrow places
    with products on both sides.

    Args:
        equations: the layer's, in order. outputs: what others read of it.
    """
    narrow = {*_narrow(equations, outputs)}
    works = [contraction_flops(equation) > 0 for equation in equations]
    found, part, busy = list[int](), 0, False
    for i, work in enumerate(works):
        if busy and i in narrow and any(works[i:]):
            part, busy = part + 1, False
        found.append(part)
        busy = busy or work
    return found


def _narrow(equations: Sequence[JaxprEqn], outputs: Sequence[Var]) -> Iterator[int]:
    """Yields the equations before which no more bytes pass than the outputs have: of what was made or read
    before and is read again."""
    last: dict[Var, int] = {a: i for i, e in enumerate(equations) for a in e.invars if isinstance(a, Var)}
    last.update(dict.fromkeys(outputs, len(equations)))
    most = sum(nbytes(v.aval) for v in outputs)
    passing: dict[Var, int] = {}
    for i, equation in enumerate(equations):
        passing = {v: size for v, size in passing.items() if last.get(v, -1) >= i}
        if sum(passing.values()) <= most:
            yield i
        seen = [*(a for a in equation.invars if isinstance(a, Var)), *equation.outvars]
        passing.update((v, nbytes(v.aval)) for v in seen)
