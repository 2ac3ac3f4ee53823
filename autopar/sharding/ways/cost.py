"""Seconds: collectives by an α–β model per mesh axis, computation by a roofline."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from autopar.core.graph import OpKind
from autopar.sharding.ways.grid import Grid

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = "all-reduce", "all-gather", "reduce-scatter"
ALL_TO_ALL, PERMUTE, SLICE = "all-to-all", "permute", "slice"


class Price(NamedTuple):
    """What a collective costs as a linear function of its buffer: seconds = fixed + per_byte · bytes.

    `wire` is how many bytes one device sends per byte of the buffer.
    """

    fixed: float
    per_byte: float
    wire: float

    def seconds(self, nbytes: float) -> float:
        return self.fixed + self.per_byte * nbytes if nbytes else 0.0


@functools.lru_cache(maxsize=4096)
def collective(grid: Grid, kind: str, axes: tuple[int, ...]) -> Price:
    """Returns the price of a collective per byte of its biggest buffer on one device.

    The buffer is the whole tensor of an all-reduce, the result of an all-gather, the input of a
    reduce-scatter, the local part in an all-to-all or permute. Each axis takes ⌈log2 n⌉ latencies and the
    bandwidth-optimal (n−1)/n of the buffer, an all-reduce twice that (Thakur, Rabenseifner, Gropp 2005). Over
    several axes the collective is hierarchical (the fastest axis works on the full buffer, slower ones on
    what is left), so that one collective
    over two axes and two nested ones cost the same.
    """
    parts = tuple(legs(grid, kind, axes))
    return Price(sum(p.fixed for p in parts), sum(p.per_byte for p in parts), sum(p.wire for p in parts))


class Leg(NamedTuple):
    """What a collective does on one axis: the terms of its `Price`."""

    axis: int
    fixed: float
    per_byte: float
    wire: float


def legs(grid: Grid, kind: str, axes: tuple[int, ...]) -> Iterator[Leg]:
    """Yields a collective's terms per axis, the fastest axis first; a permute counts on its slowest axis."""
    if kind == SLICE or not axes:
        return
    if kind == PERMUTE:
        slowest = min(axes, key=lambda a: grid.bandwidth[a])
        yield Leg(slowest, max(grid.latency[a] for a in axes), 1 / grid.bandwidth[slowest], 1.0)
        return
    left = 1.0
    for a in sorted(axes, key=lambda a: -grid.bandwidth[a]):
        n = grid.sizes[a]
        twice = 2 if kind == ALL_REDUCE else 1
        sent = twice * (n - 1) / n * left
        yield Leg(a, twice * math.ceil(math.log2(n)) * grid.latency[a], sent / grid.bandwidth[a], sent)
        if kind != ALL_TO_ALL:
            left /= n


def compute(
    kind: OpKind,
    flops: float,
    rate: float,
    bandwidth: float,
    reads: Sequence[float],
    writes: float,
    reduces: bool,
) -> float:
    """Returns the seconds one device computes for its part of an operation.

    Args:
        kind: what the operation is; views cost nothing. Elementwise ones and reductions are parts of kernels,
            which are priced as a whole (`problem/streams.py`).
        flops: FLOPs of this device's part. rate: FLOP/s. bandwidth: bytes/s.
        reads: bytes of each local operand. writes: bytes of the local results.
        reduces: the operation sums over whole operands; one that does not (a gather) reads no more than it
            writes.
    """
    if kind is OpKind.VIEW:
        return 0.0
    if kind is OpKind.CONTRACTION:
        return max(flops / rate, (sum(reads) + writes) / bandwidth)
    if kind is OpKind.INDEXED:
        return max(flops / rate, _indexed(reads, writes) / bandwidth)
    read = sum(r if reduces else min(r, writes) for r in reads)
    return max(flops / rate, (read + writes) / bandwidth)


def _indexed(reads: Sequence[float], writes: float) -> float:
    """Returns bytes moved where an index says which part of a table is read or written.

    The table is the largest operand. What is read of it is as much as is written elsewhere; where it comes
    back itself, as large as it was, it is changed in place by as much as the other operands hold.
    """
    table = max(reads, default=0.0)
    others = sum(reads) - table
    return 2 * others if writes >= table else others + 2 * writes
