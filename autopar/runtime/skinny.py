"""Products of a large matrix with few vectors, such as decoding takes with its weights, for host devices.

They take as long as it takes to read the matrix, and how fast that is depends on how they are written down.

- One vector: as a batch of as many products as there are cores, each of rows that follow each other. XLA cuts
  one product in smaller pieces, which cores take by turns.
- Some vectors: a kernel multiplies several rows at a time, so it reads several streams of memory, and a core
  fetches ahead of one stream in a page. Of rows that are shorter than a page two streams meet in one. So
  rows are read in groups, as one row that fills a page: `[rows, length]` is `[rows / 2, 2 · length]`, and the
  vectors stand twice in a matrix, above zeros and below. Lanes that would have been empty multiply by these.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

Array = Any

LEAST = 1 << 20
"""Bytes of a matrix from which on it matters."""

PAGE = 4096
"""Bytes of memory within which a core fetches ahead of one stream."""

LANES = 16
"""Numbers that a kernel multiplies at once: so many vectors cost no more than one."""


class _Skinny(NamedTuple):
    """A product as matrix · vectors, `[rows, length]` · `[length, columns]`, and whether it stood the other
    way round.

    Attributes:
        out, free: dims of the result that come from the matrix and from the vectors.
        state: the matrix is what the step was given, not what it computes.
    """

    matrix: Array
    vectors: Array
    out: tuple[int, ...]
    free: tuple[int, ...]
    swapped: bool
    state: bool

    def result(self, y: Array) -> Array:
        """Returns the result in the shape that the product has."""
        y = y.reshape(*self.out, *self.free)
        first = len(self.out)
        return y.transpose([*range(first, y.ndim), *range(first)]) if self.swapped else y


def product(
    lhs: Array, rhs: Array, dimension_numbers: Any, state: Sequence[bool] = (False, False)
) -> Array | None:
    """Returns what `lax.dot_general` does, written so that a large matrix is read fast; None of others.

    The dims that are summed over must be the matrix's last, in the same order; both operands float32, with
    no dims of a batch.

    Args:
        lhs, rhs, dimension_numbers: as of `lax.dot_general`.
        state: of each operand, whether it is what the step was given. Only rows of such a matrix are read in
            groups: what is not finite in one, infinity or NaN, makes the others' results NaN.
    """
    found = _skinny(lhs, rhs, dimension_numbers, state)
    if found is None:
        return None
    return _by_core(found) if found.vectors.shape[1] == 1 else _in_groups(found)


def _skinny(lhs: Array, rhs: Array, numbers: Any, state: Sequence[bool]) -> _Skinny | None:
    sums, batches = numbers
    if any(batches) or {str(lhs.dtype), str(rhs.dtype)} != {"float32"}:
        return None
    swapped = math.prod(lhs.shape) < math.prod(rhs.shape)
    (matrix, over), (x, along) = sorted(
        [(lhs, tuple(sums[0])), (rhs, tuple(sums[1]))], key=lambda side: -math.prod(side[0].shape)
    )
    outer = matrix.ndim - len(over)
    if over != tuple(range(outer, matrix.ndim)) or 4 * math.prod(matrix.shape) < LEAST:
        return None
    rest = [d for d in range(x.ndim) if d not in along]
    out, free = matrix.shape[:outer], tuple(x.shape[d] for d in rest)
    rows, length, columns = math.prod(out), math.prod(matrix.shape[outer:]), math.prod(free)
    if not 0 < columns <= LANES // 2:
        return None
    vectors = x.transpose([*along, *rest]).reshape(length, columns)
    return _Skinny(matrix.reshape(rows, length), vectors, out, free, swapped, state[swapped])


def _by_core(x: _Skinny) -> Array | None:
    """The product as one for each core."""
    rows, length = x.matrix.shape
    parts = cores()
    if parts == 1 or rows % parts:
        return None
    matrices = x.matrix.reshape(parts, rows // parts, length)
    vectors = jnp.broadcast_to(x.vectors, (parts, *x.vectors.shape))
    return x.result(lax.dot_general(matrices, vectors, (((2,), (1,)), ((0,), (0,)))))


def _in_groups(x: _Skinny) -> Array | None:
    """The product with as many rows as fill a page read as one."""
    rows, length = x.matrix.shape
    columns = x.vectors.shape[1]
    group = -(-PAGE // (4 * length))
    if group == 1 or rows % group or group * columns > LANES or not x.state:
        return None
    own = jnp.eye(group, dtype=bool).reshape(group, 1, group, 1)
    vectors = jnp.where(own, x.vectors.reshape(1, length, 1, columns), 0.0)
    vectors = vectors.reshape(group * length, group * columns)
    return x.result(x.matrix.reshape(rows // group, group * length) @ vectors)


def cores() -> int:
    """Returns how many cores this process may use, which is how many threads XLA computes with."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
