"""The room's front: the best plan of a region, and a few of them from fastest to leanest."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from autopar.core.errors import BadInput, DoesNotFit, PlanError
from autopar.core.graph import Graph, Phase, Value
from autopar.core.mesh import Mesh
from autopar.core.plan import Memory, ShardingPlan
from autopar.core.spec import Spec, text
from autopar.core.stopwatch import section
from autopar.sharding.alike import share
from autopar.sharding.assemble import Costs, assemble
from autopar.sharding.build import Builder
from autopar.sharding.copies import share_reads
from autopar.sharding.grid import Grid, grid_of
from autopar.sharding.limited import fitting, leanest
from autopar.sharding.memory import BY, Item, totals, usage
from autopar.sharding.model import Model
from autopar.sharding.moved import second_layouts
from autopar.sharding.options import Options
from autopar.sharding.region import Region, extract, region_key
from autopar.sharding.result import Reader, loops, specs_of, triples
from autopar.sharding.solving import Solved, least_peak, minimise

DEFAULT = Options()

DEEP = 150
"""Nodes from which on like parts share a decision."""

PRICES = (0.0, 1e-12, 1e-11, 1e-10)
"""Seconds per byte: a gigabyte saved may cost nothing, 1, 10, 100 ms a step."""

SHARED_GAP, WORTH = 1.1, 0.005
"""How much further from the optimum than for its own stage a plan may be proven for another one, where the
solver ran out of time: that factor, and half a per cent."""


@dataclass(frozen=True)
class Setting:
    """A region on a mesh, with its choice model: all that the solver's runs for different prices share."""

    region: Region
    mesh: Mesh
    grid: Grid
    options: Options
    model: Model
    items: tuple[Item, ...]
    builder: Builder
    known: dict[Hashable, Any] = field(default_factory=dict[Hashable, Any], compare=False)

    def nbytes(self, value: Value) -> int:
        return self.builder.nbytes(value)

    def costs(self, price: float, cautious: bool = True) -> Costs:
        """Returns the costs at a price of memory, like parts merged where that is worth it.

        cautious: with what may have to be held while one operation runs (`memory.BY`).
        """
        key = "costs", price, cautious, self.options.share
        if key not in self.known:
            with section("build"):
                items = tuple(item for item in self.items if cautious or item.role != BY)
                self.known[key] = self.merged(assemble(self.model, self.grid, self.nbytes, items, price))
        return self.known[key]

    def merged(self, costs: Costs) -> Costs:
        """Returns costs of the model, like parts merged where that is worth it."""
        return share(costs) if self.options.share and len(costs.nodes) > DEEP else costs

    def free(self, price: float) -> Solved:
        """Returns the best choice at a price of memory, whatever there is of it."""
        key = "free", price, self.options.share, self.options.seconds, self.options.gap
        if key not in self.known:
            self.known[key] = minimise(self.costs(price), None, self.options.seconds, self.options.gap)
        return self.known[key]

    @functools.cached_property
    def least(self) -> int:
        """Bytes that no choice can stay below, whatever is moved."""
        return least_peak(item for item in self.items if item.role != BY)

    def memory(self, chosen: Sequence[int]) -> Memory:
        """Returns the memory a choice takes."""
        limit = limit_of(self.options, self.mesh)
        regather = bool(self.options.regather)
        held = second_layouts(self.region, self.model, self.grid, self.nbytes, chosen, regather)
        return totals(self.items, held, chosen, self.options.in_flight, limit)


def limit_of(options: Options, mesh: Mesh) -> int:
    """Returns the bytes a device may use."""
    return mesh.device.memory if options.limit is None else options.limit


def plan(graph: Graph, equations: Iterable[int], mesh: Mesh, options: Options = DEFAULT) -> ShardingPlan:
    """Returns the cheapest way to shard some equations over a mesh that keeps every device within its memory.

    Args:
        graph: the step. equations: indices of the region, one stage or the whole graph. mesh: the devices.
        options: limits and prices.

    Raises:
        DoesNotFit: no plan keeps within the limit; says how much is missing and which tensors are the
            biggest.
        PlanError: a pinned layout cannot be kept.
        BadInput: options that make no sense.
    """
    keyed = _keyed(_Same(graph), tuple(equations))
    return relabel(_planned(keyed, mesh, canonical(options, keyed.region)), keyed.region)


def offers(
    graph: Graph,
    equations: Iterable[int],
    mesh: Mesh,
    options: Options = DEFAULT,
    prices: Sequence[float] = PRICES,
) -> tuple[ShardingPlan, ...]:
    """Returns a few plans of one region, from fastest to leanest: one per price of memory, none dominated.

    Regions with equal signatures (equal layers) share the work. A limit holds only when `options.limit` is
    set.

    Args:
        prices: seconds per byte of state and residuals.
    """
    region = extract(graph, equations)
    plain = replace(region, ids=(), indices=(), values=tuple(replace(v, name="") for v in region.values))
    keyed, own = _Keyed(region_key(region), plain), canonical(options, region)
    found = [_priced(keyed, mesh, own, price) for price in sorted({*prices})]
    found.sort(key=lambda p: (step_seconds(p, region.microbatches), p.memory.peak))
    front: list[ShardingPlan] = []
    for each in found:
        if not front or each.memory.peak < front[-1].memory.peak:
            front.append(each)
    return tuple(relabel(each, region) for each in front)


@dataclass(frozen=True)
class _Keyed:
    """A region that is compared by its key only."""

    key: str
    region: Region

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass(frozen=True, eq=False)
class _Same:
    """A graph that is compared by identity: comparing what it holds would take longer than what is saved."""

    graph: Graph

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.graph is other.graph

    def __hash__(self) -> int:
        return id(self.graph)


@functools.lru_cache(maxsize=4)
def _keyed(same: _Same, equations: tuple[int, ...]) -> _Keyed:
    """The region of some equations, with its key: one step is often planned again with other options."""
    region = extract(same.graph, equations)
    return _Keyed(region_key(region), region)


@functools.lru_cache(maxsize=256)
def _planned(keyed: _Keyed, mesh: Mesh, options: Options) -> ShardingPlan:
    """The plan of a region, in its own ids: equal stages of a pipeline are planned once.

    Stages that differ only in how many micro-batches they hold share a plan if that costs them nothing that
    can be proven: a plan for more in flight fits, and what an unlimited device could do at best bounds both.
    """
    alike = _alike(keyed, mesh, replace(options, in_flight=1))
    fitting = [other for other in alike if other.memory.in_flight > options.in_flight]
    if fitting:
        best = min(fitting, key=lambda other: other.objective)
        bound = _unlimited(keyed, mesh, replace(options, in_flight=1))
        memory = replace(best.memory, in_flight=options.in_flight)
        shared = replace(best, memory=memory, bound=max(0.0, min(bound, best.objective)), status="feasible")
        if shared.gap <= options.gap or (
            best.gap > options.gap and shared.gap <= SHARED_GAP * best.gap + WORTH
        ):
            return shared
    found = _kept_or_moved(keyed, mesh, options)
    alike.append(found)
    return found


def _kept_or_moved(keyed: _Keyed, mesh: Mesh, options: Options) -> ShardingPlan:
    """State that both passes read in another layout is kept in it, unless memory is short and the plan that
    moves it twice is faster."""
    if options.regather is not None or not keyed.region.whole:
        return _solve(_prepared(keyed, mesh, options))
    setting = _prepared(keyed, mesh, replace(options, regather=False))
    again = replace(options, regather=True)
    try:
        kept = _solve(setting)
    except DoesNotFit as error:
        if error.least is not None:  # whatever is moved again, that fits no better
            raise
        return _solve(_prepared(keyed, mesh, again))
    if kept.objective <= (1 + options.gap) * setting.free(options.memory_price).objective:
        return kept
    try:
        moved = _solve(_prepared(keyed, mesh, again))
    except DoesNotFit:
        return kept
    best = min(kept, moved, key=lambda found: found.objective)
    return replace(best, bound=min(kept.bound, moved.bound))


@functools.lru_cache(maxsize=256)
def _alike(keyed: _Keyed, mesh: Mesh, options: Options) -> list[ShardingPlan]:
    """The plans made so far for one region with any number of micro-batches in flight."""
    return []


@functools.lru_cache(maxsize=256)
def _unlimited(keyed: _Keyed, mesh: Mesh, options: Options) -> float:
    """Seconds that no plan of the region goes below, whatever memory there is."""
    return _prepared(keyed, mesh, options).free(options.memory_price).bound


@functools.lru_cache(maxsize=4096)
def _priced(keyed: _Keyed, mesh: Mesh, options: Options, price: float) -> ShardingPlan:
    return _solve(_prepared(keyed, mesh, options), price, limited=options.limit is not None)


def _prepared(keyed: _Keyed, mesh: Mesh, options: Options) -> Setting:
    """The choice model of a region; one is made for all limits and prices."""
    check_options(options)
    plain = replace(options, limit=None, memory_price=0.0, gap=0.0, seconds=1.0, share=True)
    return replace(_models(keyed, mesh, plain), options=options)


@functools.lru_cache(maxsize=16)  # these are big; one is needed again only for other limits and prices
def _models(keyed: _Keyed, mesh: Mesh, options: Options) -> Setting:
    return prepare(keyed.region, mesh, options)


def step_seconds(plan: ShardingPlan, microbatches: int) -> float:
    """Returns the seconds of one step: every micro-batch forward and backward, then the update."""
    return microbatches * (plan.forward + plan.backward) + plan.apply


def prepare(region: Region, mesh: Mesh, options: Options) -> Setting:
    """Returns the choice model of a region (ids in `options.pinned` are the region's)."""
    check_options(options)
    with section("build"):
        return _built(region, mesh, options)


def _built(region: Region, mesh: Mesh, options: Options) -> Setting:
    grid = grid_of(mesh)
    builder = Builder(region, grid, mesh.device, options)
    model = builder.build()
    share_reads(model, grid, region, bool(options.regather))
    _pin(model, region, grid, options)
    items = usage(region, model, grid, builder.nbytes, options.in_flight)
    return Setting(region, mesh, grid, options, model, items, builder)


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


def _solve(setting: Setting, price: float | None = None, limited: bool = True) -> ShardingPlan:
    options = setting.options
    price = options.memory_price if price is None else price
    limit = limit_of(options, setting.mesh) if limited else None
    solved = setting.free(price)
    fits = solved.chosen is not None and (limit is None or setting.memory(solved.chosen).peak <= limit)
    if limit is not None and not fits:
        solved = fitting(setting, price, limit)
    if solved.chosen is None:
        solved = leanest(setting)
    return _finish(setting, solved, price)


def _finish(setting: Setting, solved: Solved, price: float) -> ShardingPlan:
    """Returns the plan of a choice, in the region's ids."""
    assert solved.chosen is not None
    region, model, grid, options = setting.region, setting.model, setting.grid, setting.options
    out = Reader(region, model, grid, setting.nbytes, solved.chosen, bool(options.regather)).read()
    micro = max(1, region.microbatches)
    total = sum(out.seconds.values()) if price == 0 else solved.objective
    proven = total <= solved.objective * (1 + options.gap) + 1e-9
    return ShardingPlan(
        mesh=setting.mesh,
        specs=specs_of(out, grid, ()),
        uses=triples(out.uses, grid, ()),
        partials=triples(out.partials, grid, ()),
        forward=out.seconds[Phase.FORWARD] / micro,
        backward=out.seconds[Phase.BACKWARD] / micro,
        apply=out.seconds[Phase.APPLY],
        memory=setting.memory(solved.chosen),
        collectives=tuple(out.collectives),
        objective=total,
        bound=max(0.0, min(solved.bound, total)),
        status=solved.status if proven else "feasible",
        notes=tuple(model.notes),
        dtypes=options.dtypes,
        products=options.products,
        loops=loops(out, model, grid),
        regather=bool(options.regather),
    )


def relabel(plan: ShardingPlan, region: Region) -> ShardingPlan:
    """Returns a plan in the region's ids with those of the graph."""

    def sites(found: tuple[tuple[int, int, Spec], ...]) -> tuple[tuple[int, int, Spec], ...]:
        return tuple((region.indices[i], k, spec) for i, k, spec in found)

    return replace(
        plan,
        specs=tuple(sorted((region.ids[v], spec) for v, spec in plan.specs)),
        uses=sites(plan.uses),
        partials=sites(plan.partials),
        collectives=tuple(replace(c, value=region.ids[c.value]) for c in plan.collectives),
        loops=tuple(replace(x, equation=region.indices[x.equation]) for x in plan.loops),
    )
