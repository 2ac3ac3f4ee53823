"""Replica groups of a collective: which devices talk to each other, in every way that XLA writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Groups = tuple[tuple[int, ...], ...]

_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:,\s*device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}"
)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTS = re.compile(r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,\s]*\},?\s*)*)\}")


def groups(attributes: str, devices: int) -> Groups:
    """Returns the groups of devices of a collective; of a permute, its (source, target) pairs.

    Three spellings exist: lists `{{0,1},{2,3}}`, an iota `[2,4]<=[4,2]T(1,0)`, and axes of an ad-hoc mesh
    `mesh['a'=2,'b'=4], device_ids=([8]) {'b'}`, where `'b':(2)2` is the part of axis b of size 2 after 2
    major positions. Empty groups are one group of all devices.
    """
    if found := _MESH.search(attributes):
        return _of_mesh(found, devices)
    if found := _IOTA.search(attributes):
        shape = _ints(found[1])
        return _rows(_iota(_ints(found[2]), _ints(found[3])).reshape(-1, shape[-1]))
    found = _LISTS.search(attributes)
    lists = [tuple(_ints(g)) for g in re.findall(r"\{([\d,\s]+)\}", found[1])] if found else []
    return tuple(lists) or (tuple(range(devices)),)


def axes_of(members: Groups, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the axes of a mesh (row-major device ids) along which members of a group differ."""
    places = np.array(np.unravel_index(np.arange(math.prod(shape)), shape)).T
    used = {
        axis
        for group in members
        for axis in range(len(shape))
        if len({int(places[device, axis]) for device in group}) > 1
    }
    return tuple(sorted(used))


def _of_mesh(found: re.Match[str], devices: int) -> Groups:
    """Groups spelled by axes of a mesh: devices that differ in these axes (or parts of axes) only."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found[1])}
    used = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", found[4])
    if found[2]:
        ids = np.arange(math.prod(sizes.values()))
        ids = ids.reshape(_ints(found[2]))
        ids = ids.transpose(_ints(found[3])) if found[3] else ids
    else:
        ids = np.arange(math.prod(sizes.values()) if sizes else devices)
    shape: list[int] = []
    taken: list[int] = []
    for name, size in sizes.items():
        parts = sorted((int(before or 1), int(part or size)) for axis, before, part in used if axis == name)
        position = 1
        for before, part in parts:  # what lies before the part, then the part itself
            if before > position:
                shape.append(before // position)
            taken.append(len(shape))
            shape.append(part)
            position = before * part
        if position < size:
            shape.append(size // position)
    if not taken:
        return tuple((int(i),) for i in ids.ravel())
    cube = np.moveaxis(ids.reshape(shape), taken, range(-len(taken), 0))
    return _rows(cube.reshape(-1, math.prod(shape[axis] for axis in taken)))


def _iota(dims: list[int], order: list[int]) -> npt.NDArray[np.int64]:
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose(order) if order else ids


def _rows(table: npt.NDArray[np.int64]) -> Groups:
    return tuple(tuple(int(i) for i in row) for row in table)


def _ints(text: str | None) -> list[int]:
    return [int(n) for n in (text or "").split(",") if n.strip()]
