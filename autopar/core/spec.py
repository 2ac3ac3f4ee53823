"""A spec: the mesh axes that shard each dim of a tensor, major first; `((), ("x", "y"))` shards dim 1 over
both.
"""

from __future__ import annotations

from typing import TypeAlias

from autopar.core.mesh import Mesh

Spec: TypeAlias = tuple[tuple[str, ...], ...]


def replicated(rank: int) -> Spec:
    """Returns the spec of a tensor of `rank` dims that every device holds whole."""
    return ((),) * rank


def axes_of(spec: Spec) -> tuple[str, ...]:
    """Returns every axis the spec uses, dim by dim."""
    return tuple(axis for dim in spec for axis in dim)


def shards(spec: Spec, mesh: Mesh) -> int:
    """Returns into how many distinct parts the tensor is cut."""
    return mesh.ways(axes_of(spec))


def local_shape(shape: tuple[int, ...], spec: Spec, mesh: Mesh) -> tuple[int, ...]:
    """Returns the shape of one device's part, rounded up where a dim does not divide."""
    return tuple(-(-size // mesh.ways(dim)) for size, dim in zip(shape, spec, strict=True))


def text(spec: Spec) -> str:
    """Returns e.g. "[x, ·, yz]"; a replicated dim is a dot."""
    return "[" + ", ".join("".join(dim) or "·" for dim in spec) + "]"
