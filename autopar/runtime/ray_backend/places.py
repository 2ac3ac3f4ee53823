"""Where a stage's devices hold the parts of a tensor: boxes computed from a spec, no devices needed."""

from __future__ import annotations

import math

from autopar.core.mesh import Mesh
from autopar.core.spec import Spec
from autopar.runtime.ray_backend.tiles import Box


def boxes(shape: tuple[int, ...], spec: Spec, mesh: Mesh) -> tuple[Box, ...]:
    """Returns per device, in mesh order (row-major), the box it holds.

    Args:
        shape: of the whole tensor; its sharded dims divide evenly. A dim beyond the spec is held whole.
    """
    names, sizes = mesh.names, mesh.shape
    held: list[Box] = []
    for position in range(mesh.size):
        at = dict(zip(names, _coordinates(position, sizes), strict=True))
        box: list[tuple[int, int]] = []
        for d, size in enumerate(shape):
            axes = spec[d] if d < len(spec) else ()
            index = 0
            for axis in axes:
                index = index * mesh.axis(axis).size + at[axis]
            part = size // mesh.ways(axes)
            box.append((index * part, (index + 1) * part))
        held.append(tuple(box))
    return tuple(held)


def _coordinates(position: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(position // math.prod(sizes[i + 1 :]) % n for i, n in enumerate(sizes))
