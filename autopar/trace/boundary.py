"""`layer_boundary`: where the user says that one layer ends and the next begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
from jax.extend.core import JaxprEqn, Literal, Primitive, Var
from jax.interpreters import ad, batching, mlir

from autopar.core.graph import Phase
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

    Neighbouring boundaries (the leaves of one tree) are one. The backward pass meets them in reverse order, so
    its regions are counted down.
    """
    count = _runs(equations, phases, backward=False)
    number = {False: 0, True: count}
    previous: dict[bool, bool] = {False: False, True: False}
    found: list[str | None] = []
    has_backward = Phase.BACKWARD in phases
    for equation, phase in zip(equations, phases):
        backward = phase is Phase.BACKWARD
        here = is_boundary(equation)
        if here and not previous[backward]:
            number[backward] += -1 if backward else 1
        previous[backward] = here
        outside = phase is None and has_backward
        found.append(None if outside else f"layer_{max(number[backward], 0)}")
    return found


def _runs(equations: Sequence[JaxprEqn], phases: Sequence[Phase | None], backward: bool) -> int:
    runs, previous = 0, False
    for equation, phase in zip(equations, phases):
        if (phase is Phase.BACKWARD) == backward:
            runs += is_boundary(equation) and not previous
            previous = is_boundary(equation)
    return runs


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
