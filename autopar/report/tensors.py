"""How a stage's big tensors are sharded, with the layers' equal tensors on one line."""

from __future__ import annotations

import re
from dataclasses import dataclass

from autopar.core.graph import Value
from autopar.core.plan import ShardingPlan
from autopar.core.spec import Spec

_INDEX = re.compile(r"\d+")


@dataclass(frozen=True)
class Group:
    """Tensors of one name pattern, shape and layout. `pattern`: the name with the indices that vary as
    "*"."""

    pattern: str
    value: Value
    spec: Spec
    count: int

    @property
    def nbytes(self) -> int:
        return self.value.nbytes * self.count


def groups(sharding: ShardingPlan, values: dict[int, Value]) -> list[Group]:
    """Returns the named tensors of a stage, largest group first; equal ones of several layers are one
    group."""
    found: dict[tuple[str, tuple[int, ...], str, Spec], list[Value]] = {}
    for v, spec in sharding.specs:
        value = values.get(v)
        if value is not None and value.name:
            key = (_INDEX.sub("*", value.name), value.shape, value.dtype, spec)
            found.setdefault(key, []).append(value)
    result = [Group(_pattern([v.name for v in vs]), vs[0], key[3], len(vs)) for key, vs in found.items()]
    return sorted(result, key=lambda g: -g.nbytes)


def _pattern(names: list[str]) -> str:
    """The common name, with "*" only where an index really varies."""
    rows = [re.split(r"(\d+)", name) for name in names]
    return "".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*rows, strict=True))
