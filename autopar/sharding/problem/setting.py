"""A region on a mesh with its choice model: all that runs of the solver for different limits share."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from autopar.core.errors import BadInput, PlanError
from autopar.core.graph import Value
from autopar.core.mesh import Mesh
from autopar.core.plan import Memory
from autopar.core.spec import Spec, text
from autopar.core.stopwatch import section
from autopar.sharding.choices.build import Builder
from autopar.sharding.choices.copies import share_reads
from autopar.sharding.choices.model import Model
from autopar.sharding.memory.alive import BY, Item, totals, usage
from autopar.sharding.memory.fusion import fusions, mark_fused
from autopar.sharding.memory.moved import Held, moves_of, second_layouts
from autopar.sharding.memory.parts import cut_at_once, divisible
from autopar.sharding.options import Options
from autopar.sharding.problem.alike import share
from autopar.sharding.problem.assemble import Costs, assemble, uneven
from autopar.sharding.problem.solving import Solved, least_peak, minimise
from autopar.sharding.problem.streams import charge
from autopar.sharding.region import Region
from autopar.sharding.ways.grid import Grid, grid_of

DEEP = 150
"""Nodes from which on like parts share a decision."""

UNHURRIED = 4
"""Times as long as other problems those without a limit of a whole step may take: all else builds on them."""


@dataclass(frozen=True)
class Setting:
    """A region on a mesh, with its choice model: all that the solver's runs for different prices share.

    unpinned: the same where nothing is pinned, if that is known.
    """

    region: Region
    mesh: Mesh
    grid: Grid
    options: Options
    model: Model
    items: tuple[Item, ...]
    builder: Builder
    known: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any], compare=False)
    unpinned: Setting | None = None

    def nbytes(self, value: Value) -> int:
        return self.builder.nbytes(value)

    def costs(self, price: float, cautious: bool = True) -> Costs:
        """Returns the costs at a price of memory, like parts merged where that is worth it.

        cautious: with what may have to be held while one operation runs (`memory.BY`).
        """
        key = "costs", price, cautious, self.options.share
        if key not in self.known:
            plain = self.plain(price, cautious)
            with section("build"):
                self.known[key] = self.merged(plain)
        return self.known[key]

    def plain(self, price: float, cautious: bool = True) -> Costs:
        """Returns the costs at a price of memory, of every part."""
        key = "plain", price, cautious
        if self.unpinned is not None and key not in self.known:
            costs = self.unpinned.plain(price, cautious)
            pinned = (np.where(np.isinf(n.cost), np.inf, c) for n, c in zip(self.model.nodes, costs.nodes))
            self.known[key] = replace(costs, nodes=tuple(pinned))
        if key not in self.known:
            with section("build"):
                items = tuple(item for item in self.items if cautious or item.role != BY)
                self.known[key] = assemble(self.model, self.grid, self.nbytes, items, price)
        return self.known[key]

    def merged(self, costs: Costs) -> Costs:
        """Returns costs of the model, like parts merged where that is worth it."""
        if not self.options.share or len(costs.nodes) <= DEEP:
            return costs
        return share(costs, *uneven(self.model, self.grid, self.nbytes))

    @property
    def deep(self) -> bool:
        """Whether like parts are merged."""
        return len(self.costs(0.0).nodes) < len(self.model.nodes)

    def free(self, price: float) -> Solved:
        """Returns the best choice at a price of memory, whatever there is of it."""
        key = "free", price, self.options.share, self.options.seconds, self.options.gap
        if key not in self.known:
            patience = self.options.seconds * (UNHURRIED if self.region.whole else 1)
            self.known[key] = minimise(self.costs(price), None, patience, self.options.gap)
        return self.known[key]

    @functools.cached_property
    def least(self) -> int:
        """Bytes that no choice can stay below, whatever is moved."""
        return least_peak(item for item in self.items if item.role != BY)

    def memory(self, chosen: Sequence[int]) -> Memory:
        """Returns the memory a choice takes."""
        chosen, limit = tuple(chosen), limit_of(self.options, self.mesh)
        known = self.known.get("memory")  # of the last choice: whoever checks a plan finishes it next
        if known is None or known[0] != chosen:
            found = totals(self.items, self.held(chosen), chosen, self.options.in_flight, limit)
            known = self.known["memory"] = chosen, found
        return replace(known[1], limit=limit)

    def held(self, chosen: Sequence[int]) -> list[Held]:
        """Returns what a choice holds beside the bytes of its single choices; negative where it is less."""
        regather = bool(self.options.regather)
        key = "second", regather
        if key not in self.known:
            self.known[key] = moves_of(self.region, self.model, regather), divisible(self.model, self.items)
        moves, parts = self.known[key]
        held = second_layouts(moves, self.model, self.grid, chosen)
        return held + cut_at_once(parts, chosen)


def alike(a: Setting, b: Setting) -> bool:
    """Returns whether two settings are the same problem: nothing is moved in one that is not in the other."""

    def reads(setting: Setting) -> list[tuple[Hashable, ...]]:
        found = setting.model.reads
        return [(r.key, r.source.node, r.target.node, r.phase, r.times, r.site, r.copy) for r in found]

    if len(a.model.nodes) != len(b.model.nodes) or reads(a) != reads(b):
        return False
    one, other = a.plain(0.0, cautious=False), b.plain(0.0, cautious=False)
    return (
        one.edges.keys() == other.edges.keys()
        and all(map(np.array_equal, one.nodes, other.nodes))
        and all(np.array_equal(matrix, other.edges[pair]) for pair, matrix in one.edges.items())
    )


def limit_of(options: Options, mesh: Mesh) -> int:
    """Returns the bytes a device may use."""
    return mesh.device.memory if options.limit is None else options.limit


def prepare(region: Region, mesh: Mesh, options: Options) -> Setting:
    """Returns the choice model of a region (ids in `options.pinned` are the region's)."""
    check_options(options)
    with section("build"):
        return _built(region, mesh, options)


def _built(region: Region, mesh: Mesh, options: Options) -> Setting:
    grid = grid_of(mesh)
    builder = Builder(region, grid, mesh.device, options)
    model = builder.build()
    fused, timed = fusions(region, model)
    mark_fused(model, fused, timed)
    charge(region, model, timed, grid)
    share_reads(model, grid, region, bool(options.regather))
    _pin(model, region, grid, options)
    items = usage(region, model, grid, builder.nbytes, options.in_flight, fused)
    return Setting(region, mesh, grid, options, model, items, builder)


def pinned(base: Setting, options: Options) -> Setting:
    """Returns the choice model with some layouts pinned (ids in `options.pinned` are the region's).

    base: without pins; all other costs are its own.
    """
    if not all(((), v) in base.model.homes for v, _ in options.pinned):  # gets a home where it is pinned only
        return prepare(base.region, base.mesh, options)
    nodes = [replace(node, cost=node.cost.copy()) for node in base.model.nodes]
    model = replace(base.model, nodes=nodes)
    _pin(model, base.region, base.grid, options)
    return replace(base, options=options, model=model, known={}, unpinned=base)


def check_options(options: Options) -> None:
    """Raises BadInput for numbers that make no sense."""
    if options.in_flight < 1:
        raise BadInput(f"in_flight must be at least 1 micro-batch, got {options.in_flight}")
    if not 0 <= options.memory_price < math.inf:
        raise BadInput(f"memory_price must be a number of seconds per byte ≥ 0, got {options.memory_price}")
    if options.limit is not None and options.limit <= 0:
        raise BadInput(f"limit must be a positive number of bytes, got {options.limit}")


def canonical(options: Options, region: Region) -> Options:
    """Returns the options with pins in the region's ids; pins of values elsewhere drop out."""
    number = {v: i for i, v in enumerate(region.ids)}
    pinned = tuple((number[v], spec) for v, spec in options.pinned if v in number)
    return replace(options, pinned=pinned)


def _pin(model: Model, region: Region, grid: Grid, options: Options) -> None:
    """Forbids every choice that contradicts a pinned layout."""
    first: dict[int, tuple[int, Spec]] = {}  # node → who pinned it before
    for v, spec in options.pinned:
        home = model.homes.get(((), v))
        if home is None:
            continue
        layout = grid.layout(spec)
        wrong = [x != layout for x in home.layouts]
        if all(wrong):
            raise PlanError(
                f"{_called(region, v)} cannot be kept as {text(spec)}: an axis does not "
                "divide its dim, or the operation that makes it cannot give it; choose axes that divide"
            )
        cost = model.nodes[home.node].cost
        cost[wrong] = math.inf
        if np.isinf(cost).all():
            other, kept = first[home.node]
            raise PlanError(
                f"{_called(region, other)} as {text(kept)} and {_called(region, v)} as {text(spec)} "
                "contradict each other: one operation decides both; leave one of them out"
            )
        first.setdefault(home.node, (v, spec))


def _called(region: Region, v: int) -> str:
    """A value in words: its name, or what makes it and where."""
    if region.values[v].name:
        return f"{region.values[v].name} {region.values[v]}"
    maker = next((e for e in region.equations if v in e.outputs), None)
    where = f" at {maker.source}" if maker is not None and maker.source else ""
    return f"{region.values[v]}" + ("" if maker is None else f" of {maker.op}{where}")
