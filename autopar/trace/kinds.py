"""Equations of one kind: a step of many like layers and parameters has few, and each is looked at once.

Whatever depends on the primitive, its parameters and the shapes and dtypes of its operands only (factor rule,
cost, text) is found out for the first equation of a kind and holds for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jax.extend.core import JaxprEqn, Literal

T = TypeVar("T")


@dataclass(frozen=True)
class Kinds:
    """Some equations by kind.

    Attributes:
        of: the kind of each equation. first: the first equation of each kind.
    """

    of: tuple[int, ...]
    first: tuple[JaxprEqn, ...]

    @classmethod
    def among(cls, equations: Sequence[JaxprEqn]) -> Kinds:
        """Returns the kinds of some equations, in order of appearance."""
        numbering = _Numbering()
        of = tuple([numbering(equation) for equation in equations])
        return cls(of, tuple(numbering.first))

    def each(self, function: Callable[[JaxprEqn], T]) -> list[T]:
        """Returns what a function of the kind says of every equation."""
        found = list(map(function, self.first))
        return [found[kind] for kind in self.of]

    def spread(self, found: Sequence[T]) -> list[T]:
        """Returns for every equation what was found for its kind."""
        return [found[kind] for kind in self.of]


class _Numbering:
    """Numbers equations by kind. Shapes and parameters are compared once per object that holds them: most
    equations share theirs."""

    def __init__(self) -> None:
        self.first: list[JaxprEqn] = []
        self._kinds: dict[Any, int] = {}
        self._objects: dict[int, int] = {}
        self._contents: dict[Any, int] = {}

    def __call__(self, equation: JaxprEqn) -> int:
        objects, params = self._objects, equation.params
        key = [equation.primitive, (objects.get(id(params)) or self._parameters(params)) if params else 0]
        for a in equation.invars:
            aval = a.aval
            number = objects.get(id(aval)) or self._number(aval, (aval.shape, aval.dtype))  # type: ignore[attr-defined]
            key.append(-number if isinstance(a, Literal) else number)
        kind = self._kinds.setdefault(tuple(key), len(self.first))
        if kind == len(self.first):
            self.first.append(equation)
        return kind

    def _parameters(self, params: dict[str, Any]) -> int:
        return self._number(params, parameters(params))

    def _number(self, held_by: Any, content: Any) -> int:
        """Returns a positive number that all objects of one content share."""
        number = self._contents.setdefault(content, len(self._contents) + 1)
        self._objects[id(held_by)] = number
        return number


def signature(equation: JaxprEqn) -> Any:
    """Returns a key, equal for equations of one kind: primitive, parameters, shapes and dtypes."""
    avals = tuple((a.aval.shape, a.aval.dtype, isinstance(a, Literal)) for a in equation.invars)  # type: ignore[attr-defined]
    return equation.primitive.name, parameters(equation.params), avals


def parameters(params: dict[str, Any]) -> Any:
    """Returns a key of an equation's parameters: themselves, or their text where they have no hash."""
    items = tuple(sorted(params.items()))
    try:
        hash(items)
    except TypeError:
        return str(items)
    return items
