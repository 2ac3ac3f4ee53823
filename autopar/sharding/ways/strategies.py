"""Ways to shard one operation: assignments of mesh axes to the factors of its rule."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from autopar.core.graph import Dims, Equation, OpKind, Rule
from autopar.sharding.ways.cost import ALL_REDUCE, REDUCE_SCATTER, collective, compute
from autopar.sharding.ways.grid import Grid, Layout

Assignment: TypeAlias = Mapping[int, tuple[int, ...]]
"""Factor → the axes that shard it, major first."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """Shape and bytes of an operand or result, unsharded."""

    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Op:
    """All that the ways to shard an operation depend on, so that equal operations share them."""

    rule: Rule
    kind: OpKind
    flops: float
    rate: float
    bandwidth: float
    operands: tuple[Tensor | None, ...]
    results: tuple[Tensor, ...]

    @functools.cached_property
    def written(self) -> int:
        """Bytes of all results."""
        return sum(t.nbytes for t in self.results)

    @functools.cached_property
    def fuses(self) -> bool:
        """Whether its kernel may compute its operands itself: elementwise ones and reductions may."""
        return self.kind is OpKind.VIEW or streams(self.kind, self.rule)


@dataclass(frozen=True, slots=True)
class Traffic:
    """A collective of the operation itself. nbytes: sent by one device."""

    kind: str
    axes: tuple[int, ...]
    nbytes: float
    seconds: float
    result: int


@dataclass(frozen=True, slots=True)
class Strategy:
    """One way to run an operation.

    Attributes:
        operands: layout in which each operand is read; None for a literal.
        made: layout of each result before it is scattered further.
        results: layout of each result.
        seconds: of computation on one device.
        traffic: collectives that finish the results.
    """

    operands: tuple[Layout | None, ...]
    made: tuple[Layout, ...]
    results: tuple[Layout, ...]
    seconds: float
    traffic: tuple[Traffic, ...] = ()

    @property
    def total(self) -> float:
        """Seconds of computation and communication."""
        return self.seconds + sum(t.seconds for t in self.traffic)

    @property
    def resolving(self) -> tuple[int, ...]:
        """Per result, how many buffers as large as its partial sums exist beside it while these are reduced.

        The sums themselves; where they are scattered a compiler without reduce-scatter makes them whole
        first.
        """
        summed = {t.result for t in self.traffic}
        pairs = zip(self.made, self.results, strict=True)
        return tuple(0 if k not in summed else 1 if a == b else 2 for k, (a, b) in enumerate(pairs))


class Ways(tuple[Strategy, ...]):
    """The ways to run an operation.

    Equal operations share one object: what is asked of it is computed once, and its columns keep their
    identity.
    """

    @functools.cached_property
    def operands(self) -> tuple[tuple[Layout, ...], ...]:
        """Per operand, the layout in which each way reads it; () for a literal."""
        columns = zip(*(way.operands for way in self), strict=True)
        return tuple(tuple(x for x in column if x is not None) for column in columns)

    @functools.cached_property
    def made(self) -> tuple[tuple[Layout, ...], ...]:
        """Per result, the layout in which each way makes it."""
        return tuple(zip(*(way.made for way in self), strict=True))

    @functools.cached_property
    def results(self) -> tuple[tuple[Layout, ...], ...]:
        """Per result, the layout in which each way leaves it."""
        return tuple(zip(*(way.results for way in self), strict=True))

    @functools.cached_property
    def resolving(self) -> tuple[npt.NDArray[np.int64], ...]:
        """Per result, `Strategy.resolving` of each way."""
        return tuple(map(np.array, zip(*(way.resolving for way in self), strict=True)))

    @functools.cached_property
    def sums(self) -> tuple[bool, ...]:
        """Per result, whether some way leaves partial sums of it."""
        return tuple(bool(each.any()) for each in self.resolving)

    @functools.cached_property
    def free(self) -> bool:
        """Whether no way takes any time by itself."""
        return not self.totals.any()

    @functools.cached_property
    def totals(self) -> npt.NDArray[np.float64]:
        """Seconds of computation and communication of each way."""
        return np.array([way.total for way in self])


def kind_of(equation: Equation) -> OpKind:
    """Returns what an equation costs; elementwise also where an operand is broadcast along dims of size 1."""
    rule = equation.rule
    if equation.kind is not OpKind.MEMORY or rule is None or rule.fixed or rule.reductions:
        return equation.kind
    dims = rule.results[0] if rule.results else ()
    tensors = [t for t in rule.operands if t]
    if any(t != dims for t in rule.results) or not tensors or all(t == dims for t in tensors):
        return equation.kind
    if all(len(t) == len(dims) and all(a in ((), b) for a, b in zip(t, dims, strict=True)) for t in tensors):
        return OpKind.FUSED
    return equation.kind


def streams(kind: OpKind, rule: Rule) -> bool:
    """Returns whether an operation is a kernel that may compute its operands itself: such a kernel costs what
    it reads and writes (`problem/streams.py`), the operation alone nothing."""
    reduction = kind is OpKind.MEMORY and bool(rule.reductions) and not rule.fixed
    return kind is OpKind.FUSED or reduction


def place(dims: Dims, axes: Assignment, sizes: Sequence[int], grid: Grid) -> Layout | None:
    """Returns the layout of one tensor under an assignment, or None when it has no spelling.

    A minor factor of a dim can only be sharded when every factor before it is sharded completely.
    """
    layout: list[tuple[int, ...]] = []
    for dim in dims:
        here: tuple[int, ...] = ()
        whole = True
        for factor in dim:
            mine = axes.get(factor, ())
            if mine and not whole:
                return None
            here += mine
            whole = whole and grid.ways(mine) == sizes[factor]
        layout.append(here)
    return tuple(layout)


def assignment(dims: Dims, layout: Layout, rule: Rule, grid: Grid) -> dict[int, tuple[int, ...]]:
    """Returns the assignment that a layout of one tensor means; axes that cannot ride along are left out."""
    axes: dict[int, tuple[int, ...]] = {}
    for dim, mine in zip(dims, layout, strict=True):
        factors = list(dim)
        for a in mine:
            while factors and grid.ways(axes.get(factors[0], ())) == rule.sizes[factors[0]]:
                factors.pop(0)
            if not factors or factors[0] in rule.fixed:
                break
            longer = (*axes.get(factors[0], ()), a)
            if rule.sizes[factors[0]] % grid.ways(longer):
                break
            axes[factors[0]] = longer
    return axes


@functools.lru_cache(maxsize=16384)
def enumerate_strategies(op: Op, grid: Grid) -> Ways:
    """Returns every way to shard an operation, the replicated one first; each pair of layouts once, at its
    cheapest.
    """
    best: dict[tuple[object, object], Strategy] = {}
    for axes in _assignments(op.rule, grid):
        for strategy in _finish(op, axes, grid):
            key = strategy.operands, strategy.results
            if key not in best or strategy.total < best[key].total:
                best[key] = strategy
    return Ways(best.values())


def _assignments(rule: Rule, grid: Grid) -> Iterator[dict[int, tuple[int, ...]]]:
    """Yields every divisible assignment; several axes on one factor in rising and in falling order."""
    used = {f for dims in [*rule.operands, *rule.results] if dims is not None for dim in dims for f in dim}
    free = [f for f in sorted(used) if f not in rule.fixed and rule.sizes[f] > 1]
    count = len(grid.sizes)
    for pick in itertools.product([None, *free], repeat=count):
        rising = {f: tuple(a for a in range(count) if pick[a] == f) for f in pick if f is not None}
        if any(rule.sizes[f] % grid.ways(axes) for f, axes in rising.items()):
            continue
        twice = [f for f, axes in rising.items() if len(axes) > 1 and f not in rule.reductions]
        for turned in itertools.product([False, True], repeat=len(twice)):
            flip = {f for f, t in zip(twice, turned, strict=True) if t}
            yield {f: axes[::-1] if f in flip else axes for f, axes in rising.items()}


def _finish(op: Op, axes: Assignment, grid: Grid) -> Iterator[Strategy]:
    """Yields the assignment's strategies: one for each way to resolve its partial sums."""
    rule = op.rule
    operands = tuple(None if dims is None else place(dims, axes, rule.sizes, grid) for dims in rule.operands)
    made = tuple(place(dims, axes, rule.sizes, grid) for dims in rule.results)
    if any(dims is not None and x is None for dims, x in zip(rule.operands, operands, strict=True)):
        return
    whole = tuple(layout for layout in made if layout is not None)
    if len(whole) < len(made):
        return
    seconds = seconds_of(op, operands, whole, axes, grid)
    summed = tuple(a for f in rule.reductions for a in axes.get(f, ()))
    if (
        (op.kind is OpKind.INDEXED or _scatters_into(op.rule))
        and summed
        and _permuted({a for mine in axes.values() for a in mine}, summed)
    ):
        return
    for scattered in _scatters(op, whole, summed, grid):
        traffic = _resolve(op, whole, scattered, summed, grid)
        ordered = seconds + _ordering(op, whole[0], scattered, grid)
        yield Strategy(operands, whole, (scattered, *whole[1:]), ordered, traffic)


def _scatters_into(rule: Rule) -> bool:
    """Whether results are sums of updates into the first operand, at places that another one tells."""
    return len(rule.operands) > 2 and bool(rule.reductions) and rule.results[:1] == rule.operands[:1]


def _permuted(used: set[int], summed: tuple[int, ...]) -> bool:
    """Whether the partitioner reorders devices around a look-up in a cut table, or a sum into one.

    It puts axes that cut neither the table nor the indices last. Where such an axis is major to all others,
    and both are cut, it sends indices and results to other devices and back, whatever that costs.
    """
    return len(used) > len(summed) and min(used) > 0


def _scatters(op: Op, made: tuple[Layout, ...], summed: tuple[int, ...], grid: Grid) -> Iterator[Layout]:
    """Yields layouts of the first result in which each summed axis is all-reduced or scattered over a dim."""
    shape = op.results[0].shape
    dims = [] if op.rule.inside else range(len(shape))
    for pick in itertools.product([None, *dims], repeat=len(summed)):
        layout = list(made[0])
        for a, d in zip(summed, pick, strict=True):
            if d is not None:
                layout[d] = (*layout[d], a)
        if all(size % grid.ways(dim) == 0 for size, dim in zip(shape, layout, strict=True)):
            yield tuple(layout)


def _resolve(
    op: Op, made: tuple[Layout, ...], scattered: Layout, summed: tuple[int, ...], grid: Grid
) -> tuple[Traffic, ...]:
    """Returns the collectives that turn partial sums into results: reduce-scatter, then all-reduce."""
    if not summed:
        return ()
    before = {a for dim in made[0] for a in dim}
    spread = tuple(a for dim in scattered for a in dim if a not in before)
    rest = tuple(a for a in summed if a not in spread)
    local = op.results[0].nbytes / grid.shards(made[0])
    found: list[Traffic] = []
    if spread:
        found.append(_traffic(REDUCE_SCATTER, spread, local, 0, grid))
        local /= grid.ways(spread)
    if rest:
        found.append(_traffic(ALL_REDUCE, rest, local, 0, grid))
    for k in range(1, len(made)):
        found.append(_traffic(ALL_REDUCE, summed, op.results[k].nbytes / grid.shards(made[k]), k, grid))
    return tuple(found)


def _ordering(op: Op, made: Layout, scattered: Layout, grid: Grid) -> float:
    """Returns the seconds to bring partial sums into order that are scattered over another dim than the
    first: see `autopar.sharding.ways.resharding.passes`."""
    if made[1:] == scattered[1:]:
        return 0.0
    return 2 * op.results[0].nbytes / grid.shards(made) / op.bandwidth


def _traffic(kind: str, axes: tuple[int, ...], nbytes: float, result: int, grid: Grid) -> Traffic:
    price = collective(grid, kind, tuple(sorted(axes)))
    return Traffic(kind, tuple(sorted(axes)), price.wire * nbytes, price.seconds(nbytes), result)


def seconds_of(
    op: Op, operands: Sequence[Layout | None], results: Sequence[Layout], axes: Assignment, grid: Grid
) -> float:
    """Returns the seconds one device computes under an assignment."""
    if streams(op.kind, op.rule):
        return 0.0
    reads = [
        t.nbytes / grid.shards(layout)
        for t, layout in zip(op.operands, operands, strict=True)
        if t is not None and layout is not None
    ]
    writes = sum(t.nbytes / grid.shards(layout) for t, layout in zip(op.results, results, strict=True))
    flops = op.flops / grid.ways(a for mine in axes.values() for a in mine)
    return compute(op.kind, flops, op.rate, op.bandwidth, reads, writes, bool(op.rule.reductions))


def follow(op: Op, operand: int, layout: Layout, grid: Grid) -> Strategy:
    """Returns how an operation runs when it follows one operand's layout as far as its rule lets it."""
    dims = op.rule.operands[operand]
    assert dims is not None, "a literal has no layout to follow"
    return run_with(op, assignment(dims, layout, op.rule, grid), grid)


@functools.lru_cache(maxsize=16384)
def follow_all(op: Op, operand: int, layouts: tuple[Layout, ...], grid: Grid) -> Ways:
    """Returns how an operation follows each of an operand's layouts."""
    each = {layout: follow(op, operand, layout, grid) for layout in dict.fromkeys(layouts)}
    return Ways(each[layout] for layout in layouts)


@functools.lru_cache(maxsize=16384)
def lead_all(op: Op, result: int, layouts: tuple[Layout, ...], grid: Grid) -> Ways:
    """Returns how an operation gives a result in each layout."""
    each = {layout: lead(op, result, layout, grid) for layout in dict.fromkeys(layouts)}
    return Ways(each[layout] for layout in layouts)


def lead(op: Op, result: int, layout: Layout, grid: Grid) -> Strategy:
    """Returns how an operation runs so that its result comes out in a layout, as far as its rule lets it."""
    return run_with(op, assignment(op.rule.results[result], layout, op.rule, grid), grid)


def run_with(op: Op, axes: dict[int, tuple[int, ...]], grid: Grid) -> Strategy:
    """Returns the strategy of an assignment with all-reduced sums; gives up factors until every layout has a
    spelling.
    """
    rule = op.rule
    while True:
        operands = tuple(None if d is None else place(d, axes, rule.sizes, grid) for d in rule.operands)
        made = tuple(place(d, axes, rule.sizes, grid) for d in rule.results)
        spelled = all(d is None or x is not None for d, x in zip(rule.operands, operands, strict=True))
        whole = tuple(layout for layout in made if layout is not None)
        if spelled and len(whole) == len(made):
            break
        axes = dict(list(axes.items())[:-1])
    summed = tuple(a for f in rule.reductions for a in axes.get(f, ()))
    seconds = seconds_of(op, operands, whole, axes, grid)
    traffic: tuple[Traffic, ...] = ()
    if summed:
        traffic = tuple(
            _traffic(ALL_REDUCE, summed, t.nbytes / grid.shards(layout), k, grid)
            for k, (t, layout) in enumerate(zip(op.results, whole, strict=True))
        )
    return Strategy(operands, whole, whole, seconds, traffic)
