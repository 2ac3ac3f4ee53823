"""`layer_boundary`: where the user says that one layer ends and the next begins."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Literal, Primitive, Var
from jax.interpreters import ad, batching, mlir

from autopar.core.graph import Phase
from autopar.trace import compat
from autopar.trace.flat import Flat

# An identity on the activations, because that is what survives differentiation, batching, jit and remat: its
# transpose is a boundary of the backward pass at the same place. A marker without operands would be dropped.
_boundary_p = Primitive("autopar_layer_boundary")
_boundary_p.def_impl(lambda x: x)
_boundary_p.def_abstract_eval(lambda aval: aval)
mlir.register_lowering(_boundary_p, lambda context, x: [x])
ad.deflinear2(_boundary_p, lambda cotangent, _: [layer_boundary(cotangent)])
batching.defvectorized(_boundary_p)


def layer_boundary(x: Any) -> Any:
    """Returns `x` unchanged, and marks that what comes after it belongs to the next layer.

    Where a function contains a boundary, its layers are the regions between boundaries, whatever names say.

    Args:
        x: the activations that pass from one layer to the next: an array or a pytree of arrays.
    """
    return jax.tree.map(lambda leaf: _boundary_p.bind(leaf) if _is_array(leaf) else leaf, x)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and hasattr(leaf, "shape")


def is_boundary(equation: JaxprEqn) -> bool:
    """Returns whether an equation is a `layer_boundary`."""
    return equation.primitive is _boundary_p


def layers(equations: Sequence[JaxprEqn], phases: Sequence[Phase | None]) -> list[str | None]:
    """Returns per equation the name of its region between boundaries ("layer_0", …), None in the apply phase.

    Neighbouring boundaries (the leaves of one tree) are one. The backward pass meets them in reverse order,
    so its regions are counted down; what it recomputes there ends in the region differentiated next.
    """
    backward = [i for i, p in enumerate(phases) if p is Phase.BACKWARD]
    ahead = [i for i, p in enumerate(phases) if p is not Phase.BACKWARD and (p or not backward)]
    recomputed = [compat.is_recomputed(e) for e in equations]
    transposed = [i for i in backward if not recomputed[i]]
    number: dict[int, int] = _numbered(equations, ahead, 0)
    last = max(_count(equations, ahead), _count(equations, transposed))
    now = last
    for again, group in itertools.groupby(backward, key=recomputed.__getitem__):
        run = list(group)
        if again:
            number |= _numbered(equations, run, now - _count(equations, run))
        else:
            down = _numbered(equations, run, 0)
            number |= {i: now - n for i, n in down.items()}
            now -= _count(equations, run)
    return [f"layer_{max(number[i], 0)}" if i in number else None for i in range(len(equations))]


def _numbered(equations: Sequence[JaxprEqn], run: Sequence[int], start: int) -> dict[int, int]:
    """Returns the number of each equation of `run`: one more after each group of boundaries."""
    found, number, before = {}, start, False
    for i in run:
        here = is_boundary(equations[i])
        number += here and not before
        found[i], before = number, here
    return found


def _count(equations: Sequence[JaxprEqn], run: Sequence[int]) -> int:
    return max(_numbered(equations, run, 0).values(), default=0)


def remove(flat: Flat) -> Flat:
    """Returns `flat` without boundaries: whoever read one reads its operand."""
    if not any(is_boundary(e) for e in flat.equations):
        return flat
    same: dict[Var, Var | Literal] = {}

    def read(atom: Var | Literal) -> Var | Literal:
        return atom if isinstance(atom, Literal) else same.get(atom, atom)

    kept, marks = [], []
    for equation, mark in zip(flat.equations, flat.marks):
        operands = [read(a) for a in equation.invars]
        if is_boundary(equation):
            same[equation.outvars[0]] = operands[0]
        else:
            kept.append(equation.replace(invars=operands))
            marks.append(mark)
    return replace(
        flat,
        outputs=tuple(read(a) for a in flat.outputs),
        equations=tuple(kept),
        marks=tuple(marks),
    )
