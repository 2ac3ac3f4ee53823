"""Which parts of a tensor travel from one mesh to another: boxes of indices, no arrays, no devices.

A *box* is (start, stop) per dim. A *tile* is the box that one or several devices of a mesh hold. Every
distinct tile of the destination is put together from the source's tiles; where several source devices hold
the same tile, the one that has sent least so far sends it (Zhuang et al. 2023, "On optimizing the
communication of model parallelism").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Box: TypeAlias = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box that travels.

    Attributes:
        box: in indices of the whole tensor.
        source: position of the device that sends it. tile: the box that device holds.
        target: which distinct tile of the destination it belongs to.
    """

    box: Box
    source: int
    tile: Box
    target: int


@dataclass(frozen=True, slots=True)
class Route:
    """How one tensor gets from mesh to mesh.

    Attributes:
        pieces: in the order in which they are sent.
        targets: the destination's distinct tiles.
        holders: per target tile, the positions of the devices that hold it.
    """

    pieces: tuple[Piece, ...]
    targets: tuple[Box, ...]
    holders: tuple[tuple[int, ...], ...]


def extent(box: Box) -> tuple[int, ...]:
    """Returns the shape of a box."""
    return tuple(max(0, stop - start) for start, stop in box)


def size(box: Box) -> int:
    """Returns the number of elements in a box."""
    return math.prod(extent(box))


def meet(a: Box, b: Box) -> Box:
    """Returns the box that both contain (of size 0 where they don't meet)."""
    return tuple((max(x[0], y[0]), min(x[1], y[1])) for x, y in zip(a, b, strict=True))


def route(source: Sequence[Box], target: Sequence[Box]) -> Route:
    """Returns what travels.

    Args:
        source, target: per device, in mesh order, the box it holds. The source's boxes cover the tensor;
            two of them are equal or disjoint.
    """
    holders: dict[Box, list[int]] = {}
    for position, box in enumerate(source):
        holders.setdefault(box, []).append(position)
    wanted: dict[Box, list[int]] = {}
    for position, box in enumerate(target):
        wanted.setdefault(box, []).append(position)
    sent = [0] * len(source)
    pieces: list[Piece] = []
    for index, box in enumerate(wanted):
        for tile, devices in holders.items():
            common = meet(tile, box)
            if size(common):
                sender = min(devices, key=lambda d: sent[d])
                sent[sender] += size(common)
                pieces.append(Piece(common, sender, tile, index))
    return Route(tuple(pieces), tuple(wanted), tuple(map(tuple, wanted.values())))


def inside(box: Box, tile: Box) -> tuple[slice, ...]:
    """Returns the slices that cut `box` out of an array that holds `tile`."""
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(box, tile, strict=True))
