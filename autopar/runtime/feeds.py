"""The batch of one call, cut into micro-batches for each stage."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import core

from autopar.core.errors import BadInput
from autopar.core.program import Buffer, Program
from autopar.runtime.array import DistributedArray, consumed
from autopar.runtime.layout import as_dtype, is_key

Array = Any


def read(leaf: Any, x: Any) -> Array:
    """Returns the argument `x` as an array that fits `leaf`, or raises BadInput naming it.

    Args:
        leaf: a `trace.traced.Leaf`.
        x: an array, or a Python number where a scalar is expected.
    """
    if type(x) is np.ndarray and x.shape == leaf.shape and x.dtype == as_dtype(leaf.dtype):
        return x
    if isinstance(x, DistributedArray):
        x.check()
    elif isinstance(x, jax.Array) and x.is_deleted():
        raise consumed(leaf.path, None)
    shape, dtype = np.shape(x), getattr(x, "dtype", None)
    if isinstance(x, jax.ShapeDtypeStruct):
        raise BadInput(f"{leaf.path}: expected an array, got its shape only ({x}); pass the array itself")
    if shape != leaf.shape or (dtype is not None and not _same(dtype, leaf.dtype)):
        want, got = _text(leaf.dtype, leaf.shape), _text(dtype or type(x).__name__, shape)
        raise BadInput(
            f"{leaf.path}: expected {want} as in the traced call, got {got}; "
            "pass arrays of the same shapes, or plan and compile the step again for these"
        )
    if isinstance(x, jax.Array | DistributedArray):
        return x
    return np.asarray(x, as_dtype(leaf.dtype))


def _text(dtype: Any, shape: tuple[int, ...]) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def _same(dtype: Any, expected: str) -> bool:
    if str(dtype) == expected:
        return True
    if is_key(dtype):
        return False
    return str(jax.dtypes.canonicalize_dtype(dtype)) == expected


@functools.cache
def _splitter(count: int) -> Callable[[Array], list[Array]]:
    def cut(x: Array) -> list[Array]:
        size = x.shape[0] // count
        return [x[i * size : (i + 1) * size] for i in range(count)]

    return jax.jit(cut)


def split(x: Array, count: int) -> Sequence[Array]:
    """Returns the micro-batches of one leaf: `count` equal parts along dim 0, in order."""
    if count == 1:
        return (x,)
    if isinstance(x, jax.Array):
        return _splitter(count)(x)
    size = x.shape[0] // count
    return [x[i * size : (i + 1) * size] for i in range(count)]


class Feeder:
    """Turns the batch leaves of a call into feeds.

    Args:
        leaves: the batch's leaves (`trace.traced.Leaf`), in the order of the arrays given to a call.
        program: says which worker is fed what. A fed value that is no leaf is the micro-batch's index.
    """

    def __init__(self, leaves: Sequence[Any], program: Program):
        self._leaves, self._count = tuple(leaves), program.microbatches
        position = {leaf.values[0]: k for k, leaf in enumerate(self._leaves)}
        self._wanted = [
            [(b, position.get(b.value), b.microbatch or 0) for b in worker.feeds] for worker in program
        ]
        self._indices = [np.int32(i) for i in range(self._count)]
        self._expected = [(leaf.shape, as_dtype(leaf.dtype)) for leaf in self._leaves]

    def fits(self, batch: Sequence[Any]) -> bool:
        """Returns whether these are arrays of the traced shapes and types."""
        return all(
            x.shape == shape and x.dtype == dtype and not x.is_deleted()
            if isinstance(x, jax.Array) and not isinstance(x, core.Tracer)
            else type(x) is np.ndarray and x.shape == shape and x.dtype == dtype
            for x, (shape, dtype) in zip(batch, self._expected, strict=True)
        )

    def __call__(self, batch: Sequence[Any]) -> list[Mapping[Buffer, Array]]:
        """Returns the feeds of each stage. Raises BadInput for a leaf of another shape or dtype."""
        arrays = [read(leaf, x) for leaf, x in zip(self._leaves, batch, strict=True)]
        return self.cut([x.fetch() if isinstance(x, DistributedArray) else x for x in arrays])

    def cut(self, batch: Sequence[Array]) -> list[Mapping[Buffer, Array]]:
        """Returns the feeds of each stage, of arrays that fit."""
        parts = [split(x, self._count) for x in batch]
        return [
            {b: self._indices[i] if k is None else parts[k][i] for b, k, i in wanted}
            for wanted in self._wanted
        ]
