"""Alternatives side by side: a graph that holds several ways to run a layer, of which a plan takes one.

Such a graph is planned, never run: `either` stands for the result of the alternative that is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeAlias

from jax import lax
from jax.extend.core import JaxprEqn, Primitive, Var

from autopar.core.graph import Remat
from autopar.trace.compat import Atom
from autopar.trace.flat import Builder, Mark

_either_p = Primitive("autopar_either")
_either_p.def_abstract_eval(lambda *avals: avals[0])

Remats: TypeAlias = bool | Remat | tuple[Remat, ...] | Mapping[str, Remat | tuple[Remat, ...]]
"""What layers compute again: all alike (True: everything), or by name or pattern ("Block_*"); several: a
graph that holds each."""


def ways(remat: Remats, layer: str | None) -> tuple[Remat, ...]:
    """Returns the ways in which a layer is to be differentiated; one that no mapping names: keeping all."""
    found = _named(remat, layer or "") if isinstance(remat, Mapping) else remat
    if isinstance(found, bool):
        return (Remat.FULL if found else Remat.NONE,)
    return (found,) if isinstance(found, Remat) else found


def _named(remat: Mapping[str, Remat | tuple[Remat, ...]], layer: str) -> Remat | tuple[Remat, ...]:
    matching = (found for pattern, found in remat.items() if fnmatchcase(layer, pattern))
    return remat.get(layer) or next(matching, Remat.NONE)


def is_either(equation: JaxprEqn) -> bool:
    """Returns whether an equation's result is one of its operands."""
    return equation.primitive is _either_p


def own(builder: Builder, start: int, atoms: Sequence[Atom], mark: Mark, like: JaxprEqn) -> list[Atom]:
    """Returns the atoms, copied where no equation since `start` makes them: an alternative makes its own."""
    made = {v for e in builder.equations[start:] for v in e.outvars}

    def mine(a: Atom) -> Atom:
        if not isinstance(a, Var) or a in made:
            return a
        return builder.bind(lax.copy_p, [a], [a.aval], {}, mark, like)[0]

    return [mine(a) for a in atoms]


def either(builder: Builder, several: Sequence[Sequence[Atom]], mark: Mark, like: JaxprEqn) -> list[Atom]:
    """Returns one atom for what each alternative made in a place: [alternatives][places] → [places]."""
    if len(several) == 1:
        return list(several[0])
    return [builder.bind(_either_p, atoms, [atoms[0].aval], {}, mark, like)[0] for atoms in zip(*several)]
