"""From the model to numbers: seconds per choice, seconds per pair of choices, bytes over time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from autopar.core.graph import Value
from autopar.sharding.choices.model import Model, Read
from autopar.sharding.memory.alive import Item
from autopar.sharding.ways.grid import Grid
from autopar.sharding.ways.resharding import table_for

Floats = npt.NDArray[np.float64]
Pair: TypeAlias = tuple[int, int]
Sizes = Callable[[Value], int]


TIE_BREAK = 1e-18
"""Seconds per byte that decide between plans of equal time: a gigabyte is worth a nanosecond."""

A_MOVE = 1e-9
"""Seconds that decide between plans of equal time before memory does: what a collective less is worth."""


@dataclass(frozen=True)
class Costs:
    """A choice problem in seconds and bytes.

    Attributes:
        nodes: seconds per choice, per node; inf: may not be taken.
        edges: (a, b) with a < b → seconds per pair of choices.
        items: (node, start, stop, bytes per choice).
        likes: per node, what has to agree for two nodes to have the same choices.
        classes: node of the model → node here, where nodes have been merged.
    """

    nodes: tuple[Floats, ...]
    edges: dict[tuple[int, int], Floats]
    items: tuple[Item, ...]
    likes: tuple[Hashable, ...]
    classes: tuple[int, ...]


def assemble(model: Model, grid: Grid, nbytes: Sizes, items: tuple[Item, ...], price: float) -> Costs:
    """Returns the costs of a model. price: seconds per byte of state and residuals."""
    nodes = [node.cost.copy() for node in model.nodes]
    for step in model.steps:
        if not step.ways.free:
            nodes[step.node] += step.times * step.ways.totals
    for (node, _), seconds in model.streaming.items():
        nodes[node] += seconds
    worth: dict[tuple[int, bool], Floats] = {}  # like items share their bytes
    for item in items:
        key = id(item.nbytes), item.lasting
        if key not in worth:
            worth[key] = (price if item.lasting else 0.0) * item.nbytes + TIE_BREAK * item.nbytes
        nodes[item.node] += worth[key]
    edges = _summed(nodes, _each_read(model, grid, nbytes))
    likes = tuple(node.like for node in model.nodes)
    return Costs(tuple(nodes), edges, items, likes, tuple(range(len(nodes))))


def _each_read(model: Model, grid: Grid, nbytes: Sizes) -> Iterator[tuple[Read, Floats]]:
    """Yields every read with its seconds; reads that are alike, those of like layers say, share an array."""
    known: dict[Hashable, Floats] = {}
    for read in model.reads:
        value = model.value(read.key)
        # layouts by identity: they are held by the model, and many
        columns = id(read.source.layouts), id(read.target.layouts)
        key = value.shape, value.dtype, *columns, read.times, len(read.kernels), read.held
        if key not in known:
            known[key] = read_seconds(model, read, grid, nbytes)
        yield read, known[key]


def uneven(model: Model, grid: Grid, nbytes: Sizes) -> tuple[list[Floats], dict[Pair, Floats]]:
    """Returns the part of the costs, of nodes and of edges, in which layers differ that are alike otherwise:
    what several kernels compute each for themselves is read by all that come later."""
    nodes = [np.zeros(node.choices) for node in model.nodes]
    for (node, _), seconds in model.streaming.items():
        nodes[node] += seconds
    several = [read for read in model.reads if len(read.kernels) > 1]
    extra = ((read, _further(model, read, grid, nbytes)) for read in several)
    return nodes, _summed(nodes, extra)


def _summed(nodes: list[Floats], reads: Iterable[tuple[Read, Floats]]) -> dict[Pair, Floats]:
    """Returns the seconds of reads by pairs of nodes; those within one are added to it."""
    edges: dict[Pair, Floats] = {}
    for read, seconds in reads:
        a, b = read.source.node, read.target.node
        if a == b:
            nodes[a] += np.diagonal(seconds)
            continue
        pair, seconds = ((a, b), seconds) if a < b else ((b, a), seconds.T)
        edges[pair] = edges[pair] + seconds if pair in edges else seconds
    return edges


def read_seconds(model: Model, read: Read, grid: Grid, nbytes: Sizes) -> Floats:
    """Returns (choices of the source, choices of the target): seconds per step to move the value."""
    value = model.value(read.key)
    fixed, per_byte, once, _, count = _prices(value, read, grid)
    size = nbytes(value)
    if not size:
        return np.zeros_like(fixed)
    seconds = read.times * (fixed + A_MOVE * count + (per_byte + once if read.kernels else per_byte) * size)
    if read.held is not None:
        return _held(read, seconds)
    return seconds + _further(model, read, grid, nbytes) if len(read.kernels) > 1 else seconds


def _held(read: Read, seconds: Floats) -> Floats:
    """Returns the seconds of a read that only half of the target's choices need (`Read.held`): what is held
    is what the forward moved, as it moved it; where nothing would have to be moved, nothing is held."""
    half = len(read.target.layouts) // 2
    same = np.array([[x == y for y in read.target.layouts[:half]] for x in read.source.layouts])
    if read.held:
        return np.hstack([np.zeros_like(same, float), np.where(same, 0.0, np.inf)])
    return np.hstack([seconds[:, :half], np.where(same, np.inf, 0.0)])


def _further(model: Model, read: Read, grid: Grid, nbytes: Sizes) -> Floats:
    """Returns the part of a read's seconds that is for kernels after the first."""
    value = model.value(read.key)
    more = _prices(value, read, grid)[3]
    return (read.times * (len(read.kernels) - 1) * nbytes(value)) * more


def _prices(value: Value, read: Read, grid: Grid) -> Floats:
    return table_for(value.shape, grid).prices(read.source.layouts, read.target.layouts)


def merge(costs: Costs, classes: list[int]) -> Costs:
    """Returns the costs when all nodes of a class take the same choice: everything of a class is summed."""
    count = max(classes, default=-1) + 1
    nodes: list[Floats] = [np.zeros(0)] * count
    likes: list[Hashable] = [None] * count
    for i, c in enumerate(classes):
        nodes[c] = nodes[c] + costs.nodes[i] if nodes[c].size else costs.nodes[i].copy()
        likes[c] = costs.likes[i]
    edges: dict[tuple[int, int], Floats] = {}
    for (a, b), seconds in costs.edges.items():
        ca, cb = classes[a], classes[b]
        if ca == cb:
            nodes[ca] += np.diagonal(seconds)
            continue
        if cb < ca:
            ca, cb, seconds = cb, ca, seconds.T
        edges[ca, cb] = edges[ca, cb] + seconds if (ca, cb) in edges else seconds
    items = tuple([Item(classes[i.node], i.start, i.stop, i.nbytes, i.role, i.key) for i in costs.items])
    return Costs(tuple(nodes), edges, items, tuple(likes), tuple(classes[c] for c in costs.classes))
