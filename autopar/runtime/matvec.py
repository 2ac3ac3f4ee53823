"""Products of many matrices with a vector each, such as decoding attends with, written for host devices.

XLA's compiler for CPUs does them one after the other on one core, however many there are: it cuts a large
product for its threads, and elementwise kernels, but not a batch of small products. As sums of elementwise
products each is such a kernel. What is summed first, and what is left for a second sum, is chosen so that the
kernels read memory in order and their inner loop runs over what lies side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from jax import lax

Array = Any

LEAST = 1 << 20
"""Bytes of matrices from which on two cores are sooner done than one."""

MANY = 64
"""Matrices from which on that is worth it. A decode step of one row of OPT-125m over 2,048 tokens, 12 large
matrices that are gathered first, takes 6 % longer with sums."""

MOST = 2048
"""Longest sum that is written out."""

PARTIAL = 16
"""Partial sums along a dim that is not the last. XLA makes two kernels of it, both with a vectorised inner
loop, if at least so many are summed at the end; of fewer it makes one, which is half as fast."""

RUNS = 8
"""Runs that the last dim is cut into; these are summed, and then what lies side by side in their sum."""


class _Operand(NamedTuple):
    """An operand of a product: the dim that is summed over, those shared with the other one, and the rest."""

    array: Array
    summed: int
    batch: tuple[int, ...]

    @property
    def free(self) -> tuple[int, ...]:
        return tuple(d for d in range(self.array.ndim) if d != self.summed and d not in self.batch)

    @property
    def is_vector(self) -> bool:
        return all(self.array.shape[d] == 1 for d in self.free)


def product(lhs: Array, rhs: Array, dimension_numbers: Any) -> Array | None:
    """Returns what `lax.dot_general` does, as sums of elementwise products; None for what is no such product.

    That is where one operand consists of large matrices, the other of a vector for each; both float32.

    Args:
        lhs, rhs, dimension_numbers: as of `lax.dot_general`.
    """
    sums, batches = dimension_numbers
    floats = {str(lhs.dtype), str(rhs.dtype)} == {"float32"}
    if not floats or len(sums[0]) != 1 or math.prod(lhs.shape[d] for d in batches[0]) < MANY:
        return None
    left, right = (_Operand(x, int(s[0]), tuple(b)) for x, s, b in zip((lhs, rhs), sums, batches))
    if left.is_vector == right.is_vector:
        return None
    matrix, vector = (right, left) if left.is_vector else (left, right)
    count = matrix.array.shape[matrix.summed]
    parts = RUNS if matrix.summed == matrix.array.ndim - 1 else PARTIAL
    if 4 * math.prod(matrix.array.shape) < LEAST or count % parts or not 2 * parts <= count <= MOST:
        return None
    y = _summed(matrix, _beside(vector, matrix))
    kept = [d for d in range(matrix.array.ndim) if d != matrix.summed]
    y = y.transpose([kept.index(d) for d in (*matrix.batch, *matrix.free)])
    shape = [lhs.shape[d] for d in (*left.batch, *left.free)] + [rhs.shape[d] for d in right.free]
    return y.reshape(shape)


def _beside(vector: _Operand, matrix: _Operand) -> Array:
    """The vectors with their dims where the matrices have them, 1 for those they have not."""
    where = dict(zip((*matrix.batch, matrix.summed), (*vector.batch, vector.summed), strict=True))
    shape = matrix.array.shape
    x = vector.array.transpose([*(where[d] for d in sorted(where)), *vector.free])
    return x.reshape([shape[d] if d in where else 1 for d in range(len(shape))])


def _summed(matrix: _Operand, x: Array) -> Array:
    """The sum of matrices · x over the summed dim, which the result has no more."""
    y, d = matrix.array, matrix.summed
    count = y.shape[d]
    if d == y.ndim - 1:
        size = count // RUNS
        runs = _sum(lambda i: _cut(y, d, i * size, size) * _cut(x, d, i * size, size), RUNS)
        return _sum(lambda i: _cut(runs, d, i, 1).squeeze(d), size)
    y, x = (z.reshape(*z.shape[:d], PARTIAL, count // PARTIAL, *z.shape[d + 1 :]) for z in (y, x))
    partial = _sum(lambda i: (_cut(y, d + 1, i, 1) * _cut(x, d + 1, i, 1)).squeeze(d + 1), count // PARTIAL)
    return _sum(lambda i: _cut(partial, d, i, 1).squeeze(d), PARTIAL)


def _cut(x: Array, dim: int, start: int, size: int) -> Array:
    return lax.slice_in_dim(x, start, start + size, axis=dim)


def _sum(term: Callable[[int], Array], count: int) -> Array:
    """Returns term(0) + … + term(count - 1), added in pairs: few additions wait for each other."""
    terms: Sequence[Array] = [term(i) for i in range(count)]
    while len(terms) > 1:
        terms = [_add(terms[i : i + 2]) for i in range(0, len(terms), 2)]
    return terms[0]


def _add(terms: Iterable[Array]) -> Array:
    first, *more = terms
    return first + more[0] if more else first
