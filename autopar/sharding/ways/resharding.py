"""From one layout to another: the cheapest chain of moves that the partitioner performs exactly as priced.

Asked for an arbitrary change of layout in one step, XLA may gather everything ("involuntary full
rematerialization"). It does what one would expect for four kinds of single steps: slicing by a new minor
axis, gathering a minor axis, an all-to-all of a minor axis, and reordering the axes of one dim. So only
chains of these are planned and priced, and the runtime constrains the value to every layout on the way
(`hops`).
"""

from __future__ import annotations

import functools
import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from autopar.core.mesh import Mesh
from autopar.core.spec import Spec
from autopar.sharding.ways.cost import ALL_GATHER, ALL_TO_ALL, PERMUTE, SLICE, collective
from autopar.sharding.ways.grid import Grid, Layout, grid_of

NOMINAL = 1 << 24
"""Bytes of the tensor for which chains are ranked; the price of the chain then uses the real size."""

Divisible: TypeAlias = tuple[tuple[bool, ...], ...]
"""Per dim and per subset of the axes (as a bit mask): may the dim be cut by them?"""


class Move(NamedTuple):
    """One step: its kind, the axes it communicates over, the layout after it, and its buffer as a share of
    the tensor.
    """

    kind: str
    axes: tuple[int, ...]
    after: Layout
    share: float


def passes(before: Layout, move: Move) -> int:
    """Returns how often a device reads or writes a move's buffer besides sending it.

    Collectives send and receive contiguous memory. Parts of a tensor along its first dim are that; those
    along another one are brought into order by a kernel that reads and writes them, before they are sent
    (where an all-to-all cuts) and after they have come (where it joins, as an all-gather does).
    """
    if move.kind not in (ALL_GATHER, ALL_TO_ALL):
        return 0
    changed = (d for d, (a, b) in enumerate(zip(before, move.after, strict=True)) if a != b)
    return 2 * sum(d > 0 for d in changed)


@functools.lru_cache(maxsize=65536)
def divisible(shape: tuple[int, ...], grid: Grid) -> Divisible:
    """Returns which subsets of the axes divide each dim of the shape."""
    subsets = range(1 << len(grid.sizes))
    ways = [grid.ways(a for a in range(len(grid.sizes)) if mask >> a & 1) for mask in subsets]
    return tuple(tuple(n == 1 or (size > 0 and size % n == 0) for n in ways) for size in shape)


def fits(layout: Layout, allowed: Divisible) -> bool:
    """Returns whether every dim is divisible by the axes that shard it."""
    return all(allowed[d][sum(1 << a for a in axes)] for d, axes in enumerate(layout))


def moves(layout: Layout, axes: int) -> Iterator[tuple[str, tuple[int, ...], Layout]]:
    """Yields (kind, axes, layout after) of every single step from a layout on a grid of so many axes."""
    used = {a for dim in layout for a in dim}
    for d, dim in enumerate(layout):
        for a in range(axes):
            if a not in used:
                yield SLICE, (a,), _with(layout, d, (*dim, a))
        if dim:
            cut = _with(layout, d, dim[:-1])
            yield ALL_GATHER, dim[-1:], cut
            for e in range(len(layout)):
                if e != d:
                    yield ALL_TO_ALL, dim[-1:], _with(cut, e, (*cut[e], dim[-1]))
        for order in itertools.permutations(dim):
            if order != dim:
                yield PERMUTE, tuple(sorted(order)), _with(layout, d, order)


def _with(layout: Layout, d: int, axes: tuple[int, ...]) -> Layout:
    return (*layout[:d], axes, *layout[d + 1 :])


class Table:
    """All layouts of tensors of one divisibility, and the cheapest chains between them, found when first
    asked for.
    """

    def __init__(self, grid: Grid, allowed: Divisible):
        self.grid, self.allowed = grid, allowed
        self.layouts = tuple(_enumerate(grid, allowed))
        self.index = {layout: i for i, layout in enumerate(self.layouts)}
        self._chains: dict[int, dict[int, tuple[Move, ...]]] = {}
        self._rows: dict[int, npt.NDArray[np.float64]] = {}
        self._prices: dict[tuple[tuple[Layout, ...], tuple[Layout, ...]], npt.NDArray[np.float64]] = {}

    def chain(self, source: Layout, target: Layout) -> tuple[Move, ...]:
        """Returns the cheapest moves from one layout to another."""
        return self._reach(self.index[source])[self.index[target]]

    def prices(self, sources: Sequence[Layout], targets: Sequence[Layout]) -> npt.NDArray[np.float64]:
        """Returns (5, sources, targets): the fixed seconds, the seconds per byte of the whole tensor, those
        more that it takes to write and to read what otherwise never reaches memory and those of every further
        kernel that reads it (`apart`), and how many collectives.
        """
        if not sources or not targets:
            return np.zeros((5, len(sources), len(targets)))
        key = tuple(sources), tuple(targets)
        if key not in self._prices:
            rows = np.stack([self._row(self.index[s]) for s in sources], axis=1)
            self._prices[key] = rows[:, :, [self.index[t] for t in targets]]
        return self._prices[key]

    def apart(self, source: Layout, chain: Sequence[Move]) -> tuple[float, float]:
        """Returns the seconds per byte to write a tensor before it is moved and to read it afterwards; and by
        how much longer every further kernel reads it than what it would make it of."""
        if all(move.kind == SLICE for move in chain):
            return 0.0, 0.0
        written, read = 1 / self.grid.shards(source), 1 / self.grid.shards(chain[-1].after)
        return (written + read) / self.grid.memory, max(0.0, read - written) / self.grid.memory

    def ordering(self, source: Layout, chain: Sequence[Move]) -> float:
        """Returns the seconds per byte to bring what is sent and received into order (`passes`)."""
        before = (source, *(move.after for move in chain))
        often = sum(passes(b, move) * move.share for b, move in zip(before, chain, strict=False))
        return often / self.grid.memory

    def _row(self, source: int) -> npt.NDArray[np.float64]:
        if source not in self._rows:
            row = np.zeros((5, len(self.layouts)))
            for target, chain in self._reach(source).items():
                row[2:4, target] = self.apart(self.layouts[source], chain)
                row[1, target] = self.ordering(self.layouts[source], chain)
                row[4, target] = sum(move.kind != SLICE for move in chain)
                for move in chain:
                    price = collective(self.grid, move.kind, move.axes)
                    row[:2, target] += price.fixed, price.per_byte * move.share
            self._rows[source] = row
        return self._rows[source]

    def _reach(self, source: int) -> dict[int, tuple[Move, ...]]:
        """Dijkstra from one layout to all others."""
        if source in self._chains:
            return self._chains[source]
        start = self.layouts[source]
        heap: list[tuple[float, int, Layout, tuple[Move, ...]]] = [(0.0, 0, start, ())]
        done: dict[int, tuple[Move, ...]] = {}
        tick = itertools.count(1)
        while heap:
            seconds, _, here, way = heapq.heappop(heap)
            if self.index[here] in done:
                continue
            done[self.index[here]] = way
            for kind, axes, after in moves(here, len(self.grid.sizes)):
                if after not in self.index or self.index[after] in done:
                    continue
                share = max(1 / self.grid.shards(here), 1 / self.grid.shards(after))
                move = Move(kind, axes, after, share)
                step = collective(self.grid, kind, axes).seconds(NOMINAL * share) + 1e-9
                step += passes(here, move) * share * NOMINAL / self.grid.memory
                heapq.heappush(heap, (seconds + step, next(tick), after, (*way, move)))
        self._chains[source] = done
        return done


def _enumerate(grid: Grid, allowed: Divisible) -> Iterator[Layout]:
    """Yields every layout in which the used axes divide, the replicated one first."""
    dims, axes = range(len(allowed)), range(len(grid.sizes))
    for pick in itertools.product([None, *dims], repeat=len(axes)):
        sets = [tuple(a for a in axes if pick[a] == d) for d in dims]
        if fits(tuple(sets), allowed):
            yield from itertools.product(*[itertools.permutations(s) for s in sets])


@functools.lru_cache(maxsize=4096)
def table(grid: Grid, allowed: Divisible) -> Table:
    """Returns the table shared by all tensors of one divisibility."""
    return Table(grid, allowed)


def table_for(shape: tuple[int, ...], grid: Grid) -> Table:
    """Returns the table for tensors of this shape."""
    return table(grid, divisible(shape, grid))


def hops(src: Spec, dst: Spec, shape: tuple[int, ...], mesh: Mesh) -> tuple[Spec, ...]:
    """Returns the layouts to constrain a tensor to, in order, so that it moves from `src` to `dst` as priced.

    Consecutive slices are one hop; nothing is returned when the layouts agree. A layout in which an axis does
    not divide its dim has no priced chain: then the target is the only hop.
    """
    grid = grid_of(mesh)
    source, target = grid.layout(src), grid.layout(dst)
    known = table_for(shape, grid)
    if source == target:
        return ()
    if source not in known.index or target not in known.index:
        return (grid.spec(target),)
    way = known.chain(source, target)
    stops = [
        move.after
        for i, move in enumerate(way)
        if move.kind != SLICE or i + 1 == len(way) or way[i + 1].kind != SLICE
    ]
    return tuple(grid.spec(layout) for layout in stops)
