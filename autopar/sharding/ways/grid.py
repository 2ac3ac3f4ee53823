"""A mesh as the planner sees it: axes by number, only those with more than one device."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from autopar.core.errors import BadInput
from autopar.core.mesh import Mesh
from autopar.core.spec import Spec

Layout: TypeAlias = tuple[tuple[int, ...], ...]
"""A `Spec` with axis numbers instead of names: per dim the axes that shard it, major first."""


@dataclass(frozen=True)
class Grid:
    """Axes of a mesh with more than one device: names, sizes, bytes/s and seconds per collective step.

    memory: bytes/s of a device's own memory.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    bandwidth: tuple[float, ...]
    latency: tuple[float, ...]
    ignored: tuple[str, ...] = ()
    memory: float = math.inf

    def ways(self, axes: Iterable[int]) -> int:
        """Returns into how many parts these axes cut."""
        return math.prod(self.sizes[a] for a in axes)

    def shards(self, layout: Layout) -> int:
        """Returns into how many distinct parts a tensor of this layout is cut."""
        return math.prod(self.sizes[a] for dim in layout for a in dim)

    def parts(self, layouts: Iterable[Layout]) -> npt.NDArray[np.int64]:
        """Returns into how many distinct parts each layout cuts a tensor."""
        return np.array([self.shards(layout) for layout in layouts], dtype=np.int64)

    def spec(self, layout: Layout) -> Spec:
        """Returns the layout with axis names."""
        return tuple(tuple(self.names[a] for a in dim) for dim in layout)

    def layout(self, spec: Spec) -> Layout:
        """Returns the spec with axis numbers; axes of size 1 shard nothing and drop out.

        Raises:
            BadInput: an axis the mesh does not have, or one that is used twice.
        """
        used = [axis for dim in spec for axis in dim]
        for axis in used:
            if axis not in self.names and axis not in self.ignored:
                raise BadInput(
                    f"layout {spec}: the mesh has no axis {axis!r}; it has {[*self.names, *self.ignored]}"
                )
            if used.count(axis) > 1:
                raise BadInput(f"layout {spec}: axis {axis!r} is used twice; a tensor can use each axis once")
        number = {name: a for a, name in enumerate(self.names)}
        return tuple(tuple(number[axis] for axis in dim if axis in number) for dim in spec)


@functools.lru_cache(maxsize=256)
def grid_of(mesh: Mesh) -> Grid:
    """Returns the grid of a mesh."""
    axes = [axis for axis in mesh.axes if axis.size > 1]
    return Grid(
        tuple(axis.name for axis in axes),
        tuple(axis.size for axis in axes),
        tuple(axis.bandwidth for axis in axes),
        tuple(axis.latency for axis in axes),
        tuple(axis.name for axis in mesh.axes if axis.size == 1),
        mesh.device.bandwidth,
    )
