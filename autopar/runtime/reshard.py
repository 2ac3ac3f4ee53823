"""From a layout on one mesh to a layout on another, without passing through the host.

`device_put` between meshes copies device to device where both sides cut the tensor into the same tiles, and
gathers on the host where they do not. So the tensor is brought into tiles that both sides can have: on the
source (one compiled function), copied, and brought into its layout on the destination (another one).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from autopar.runtime.layout import JaxDevice

Array = Any
Tiling = tuple[int, ...]
"""Into how many tiles each dim is cut."""


def tiling(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> Tiling:
    """Returns into how many tiles a layout cuts each dim."""
    return (
        tuple(n // k for n, k in zip(shape, sharding.shard_shape(shape)))
        if math.prod(shape)
        else (1,) * len(shape)
    )


def meeting(shape: tuple[int, ...], target: Tiling, source: int, destination: int) -> Tiling:
    """Returns the tiles that travel: the target's, as finely as `source` devices can hold them.

    Where the destination holds every tile several times, finer tiles travel, each once, and are gathered
    there.

    Args:
        shape: of the tensor. target: its tiling on the destination.
        source, destination: numbers of devices.
    """
    tiles, left = list[int](), source
    for count in target:
        tiles.append(math.gcd(count, left))
        left //= tiles[-1]
    if tuple(tiles) != target:
        return tuple(tiles)
    spare = math.gcd(left, destination // math.prod(target))
    for d in sorted(range(len(shape)), key=lambda d: shape[d], reverse=True):
        if spare > 1 and shape[d] % (tiles[d] * spare) == 0:
            tiles[d] *= spare
            break
    return tuple(tiles)


def tiled(devices: Sequence[JaxDevice], tiles: Tiling) -> NamedSharding:
    """Returns the layout that cuts a tensor into `tiles` over these devices; left-over ones hold copies."""
    names = tuple(f"t{d}" for d in range(len(tiles)))
    grid = np.asarray(devices, dtype=object).reshape(*tiles, -1)
    mesh = jax.sharding.Mesh(grid, (*names, "copies"), axis_types=(AxisType.Auto,) * grid.ndim)
    return NamedSharding(mesh, PartitionSpec(*names))


@functools.cache
def _identity(layouts: tuple[jax.sharding.Sharding, ...]) -> Callable[[list[Array]], list[Array]]:
    return jax.jit(lambda xs: xs, out_shardings=list(layouts))


def carrier(
    arrays: Sequence[Array], targets: Sequence[NamedSharding]
) -> Callable[[Sequence[Array]], list[Array]]:
    """Returns a function that brings arrays like these into the target layouts."""
    leave, arrive = list[NamedSharding | None](), list[NamedSharding]()
    for x, target in zip(arrays, targets, strict=True):
        out, into = _way(x, target)
        leave.append(out)
        arrive.append(into)
    first = [k for k, layout in enumerate(leave) if layout is not None]
    last = [k for k, layout in enumerate(arrive) if layout is not targets[k]]
    before = _identity(tuple(leave[k] for k in first))  # type: ignore[arg-type]
    after = _identity(tuple(targets[k] for k in last))

    def carry(arrays: Sequence[Array]) -> list[Array]:
        moving = _changed(list(arrays), first, before)
        return _changed(jax.device_put(moving, arrive), last, after)

    return carry


def _changed(xs: list[Array], which: list[int], change: Callable[[list[Array]], list[Array]]) -> list[Array]:
    if which:
        for k, x in zip(which, change([xs[k] for k in which])):
            xs[k] = x
    return xs


def _way(x: Array, target: NamedSharding) -> tuple[NamedSharding | None, NamedSharding]:
    """The layout to leave the source in (None: as it is) and the one to arrive in at the destination."""
    came, wanted = tiling(x.sharding, x.shape), tiling(target, x.shape)
    if came == wanted:
        return None, target
    source, destination = _devices(x.sharding), _devices(target)
    tiles = meeting(x.shape, wanted, len(source), len(destination))
    leave = None if tiles == came else tiled(source, tiles)
    return leave, target if tiles == wanted else tiled(destination, tiles)


def _devices(sharding: NamedSharding) -> tuple[JaxDevice, ...]:
    assert isinstance(sharding.mesh, jax.sharding.Mesh), "arrays lie on real meshes"
    return tuple(sharding.mesh.devices.flat)
