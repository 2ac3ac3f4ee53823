"""Variables of new equations given the names that the rest of the trace already uses."""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend.core import Var

from autopar.trace.compat import Atom
from autopar.trace.flat import Builder


def keep_names(builder: Builder, start: int, made: Sequence[Atom], names: Sequence[Var]) -> dict[Var, Atom]:
    """Returns what to read in place of each of `names` that could not be kept.

    The equations added to `builder` since position `start` made the atoms `made`, which stand for `names`.
    Where such an atom is a variable that one of these equations makes, it is renamed; a literal, an operand,
    or a result that comes twice is not.
    """
    own = {v for e in builder.equations[start:] for v in e.outvars}
    renamed: dict[Var, Var] = {}
    left: dict[Var, Atom] = {}
    for atom, name in zip(made, names, strict=True):
        if isinstance(atom, Var) and atom in own and atom not in renamed:
            renamed[atom] = name
        else:
            left[name] = renamed.get(atom, atom) if isinstance(atom, Var) else atom
    for i in range(start, len(builder.equations)):
        equation = builder.equations[i]
        builder.equations[i] = equation.replace(
            invars=[renamed.get(a, a) if isinstance(a, Var) else a for a in equation.invars],
            outvars=[renamed.get(v, v) for v in equation.outvars],
        )
    return left
