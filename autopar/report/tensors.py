"""How a stage's big tensors are sharded, with equal tensors (layers, moments) on one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from autopar.core.graph import Value
from autopar.core.plan import Plan, ShardingPlan
from autopar.core.spec import Spec

_INDEX = re.compile(r"\d+")
_PART = re.compile(r"\['([^']*)'\]|\[([^\]]*)\]|\.?([^.\[\]/]+)")
TAIL = 3
"""Tensors whose paths agree in so many last parts (but for indices) belong together."""


@dataclass(frozen=True)
class Group:
    """Tensors of one shape, layout and end of their path. `pattern`: that end, with what varies as "*"."""

    pattern: str
    value: Value
    spec: Spec
    count: int

    @property
    def nbytes(self) -> int:
        return self.value.nbytes * self.count


def path_of(name: str) -> tuple[str, ...]:
    """Returns the parts of a tree path: "state.params['Block_0']['kernel']" is state, params, …"""
    return tuple(a or b or c for a, b, c in _PART.findall(name))


def standing(plan: Plan) -> dict[int, Value]:
    """Returns a plan's values by number, but for new state, which takes the place of the old."""
    new = {plan.outputs[output] for output, _ in plan.aliases}
    return {v: value for v, value in plan.value.items() if v not in new}


def groups(sharding: ShardingPlan, values: dict[int, Value]) -> list[Group]:
    """Returns the named tensors of a stage, largest group first."""
    found: dict[tuple[object, ...], list[tuple[str, ...]]] = {}
    first: dict[tuple[object, ...], tuple[Value, Spec]] = {}
    for v, spec in sharding.specs:
        value = values.get(v)
        if value is not None and value.name:
            path = path_of(value.name)
            key = (_INDEX.sub("*", "/".join(path[-TAIL:])), value.shape, value.dtype, spec)
            found.setdefault(key, []).append(path)
            first.setdefault(key, (value, spec))
    result = [Group(_pattern(paths), *first[key], len(paths)) for key, paths in found.items()]
    return sorted(result, key=lambda g: (-g.nbytes, g.pattern))


def _pattern(paths: Sequence[tuple[str, ...]]) -> str:
    """The common end of the paths; an index that varies is "*", what varies before it is "…"."""
    tail: list[str] = []
    for parts in zip(*(reversed(path) for path in paths), strict=False):
        if len({_INDEX.sub("*", part) for part in parts}) > 1:
            break
        tail.insert(0, parts[0] if len(set(parts)) == 1 else _INDEX.sub("*", parts[0]))
    whole = len(tail) == max(map(len, paths))
    return "/".join(tail if whole else ["…", *tail])
