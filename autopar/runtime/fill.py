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


def fill(slot: Slot, sharding: jax.sharding.Sharding, read: Read | None) -> Array:
    """Returns the array of a slot; `read` is called once for each distinct slice that this process holds."""
    dtype = layout.as_dtype(slot.dtype)
    if read is None:
        return jax.jit(lambda: jnp.zeros(slot.shape, dtype), out_shardings=sharding)()
    known: dict[Any, np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        key = tuple(i.indices(size) for i, size in zip(index, slot.shape, strict=True))
        if key not in known:
            known[key] = np.asarray(read(tuple(slice(*k) for k in key))).astype(dtype, copy=False)
        return known[key]

    return jax.make_array_from_callback(slot.shape, sharding, part)
