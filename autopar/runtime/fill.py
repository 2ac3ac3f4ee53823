"""Arrays made where they live: each device's slice is read by itself, so that nobody holds the whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from autopar.core.program import Slot
from autopar.runtime import layout

Array = Any
Index: TypeAlias = tuple[slice, ...]
Read: TypeAlias = Callable[[Index], np.ndarray]
"""Index of a slice → its elements, in any float type. It travels to other processes, so it can be pickled."""

Fillers: TypeAlias = Mapping[Any, "Read | None"]
"""Buffer → how to read it; None: zeros."""


BLOCK = 64 << 20
"""Bytes that an arena asks the system for at once."""

ALIGNMENT = 64
"""Bytes at whose multiples XLA reads host memory where it lies, without a copy."""


class Arena:
    """Host memory in large blocks, for arrays that live as long as each other.

    numpy asks for huge pages for large blocks. Hundreds of arrays of a few megabytes each, as a model's
    weights are, get none by themselves; reading them then costs a fifth more time, and several times as much
    after others have used the machine.
    """

    def __init__(self) -> None:
        self._block, self._used = np.empty(0, np.uint8), 0

    def copy(self, x: np.ndarray) -> np.ndarray:
        """Returns a copy of an array that lies here, aligned for XLA; it keeps its block alive."""
        if self._used + x.nbytes > self._block.nbytes:
            self._block = np.empty(max(BLOCK, x.nbytes) + ALIGNMENT, np.uint8)
            self._used = -self._block.ctypes.data % ALIGNMENT
        place = self._block[self._used : self._used + x.nbytes].view(x.dtype).reshape(x.shape)
        place[...] = x
        self._used += -(-x.nbytes // ALIGNMENT) * ALIGNMENT
        return place


def fill(slot: Slot, sharding: jax.sharding.Sharding, read: Read | None, arena: Arena) -> Array:
    """Returns the array of a slot; `read` is called once for each distinct slice that this process holds.

    On CPU devices it lies in the arena.
    """
    dtype = layout.as_dtype(slot.dtype)
    if read is None:
        return jax.jit(lambda: jnp.zeros(slot.shape, dtype), out_shardings=sharding)()
    known: dict[Any, np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        key = tuple(i.indices(size) for i, size in zip(index, slot.shape, strict=True))
        if key not in known:
            known[key] = np.asarray(read(tuple(slice(*k) for k in key))).astype(dtype, copy=False)
            if here:
                known[key] = arena.copy(known[key])
        return known[key]

    places = sharding.addressable_devices_indices_map(slot.shape)
    here = all(device.platform == "cpu" for device in places)
    if not here:
        return jax.make_array_from_callback(slot.shape, sharding, part)
    shards = [jax.device_put(part(index), device, may_alias=True) for device, index in places.items()]
    return jax.make_array_from_single_device_arrays(slot.shape, sharding, shards)
