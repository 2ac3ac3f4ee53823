"""The room's front: the best plan of a region, and a few of them from fastest to leanest."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from autopar.core.errors import DoesNotFit
from autopar.core.graph import Graph, Phase
from autopar.core.mesh import Mesh
from autopar.core.plan import ShardingPlan
from autopar.core.spec import Spec
from autopar.sharding.limit.limited import WATCHED, fitting, leanest
from autopar.sharding.limit.lowered import expected
from autopar.sharding.limit.mixing import keeping_products
from autopar.sharding.limit.squeeze import promised, proven
from autopar.sharding.options import Options
from autopar.sharding.problem.setting import (
    Setting,
    alike,
    canonical,
    check_options,
    limit_of,
    pinned,
    prepare,
)
from autopar.sharding.problem.solving import Solved
from autopar.sharding.region import Region, extract, region_key
from autopar.sharding.result import Reader, loops, specs_of, triples

DEFAULT = Options()

PRICES = (0.0, 1e-12, 1e-11, 1e-10)
"""Seconds per byte: a gigabyte saved may cost nothing, 1, 10, 100 ms a step."""

SHARED_GAP, WORTH = 1.1, 0.0075
"""How much further from the optimum than for its own stage a plan may be proven for another one, where the
solver ran out of time: that factor, and three quarters of a per cent."""

FARTHER = 1.1
"""Where keeping gathered state promises no plan within so many times the seconds of one that is known, moving
it twice is not looked at."""

FAR = 0.15
"""A deep region's plan that keeps gathered state and is proven to be this near the best is taken as it is."""


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
    keyed = _keyed(Same(graph), tuple(equations))
    found = _tried(keyed, mesh, canonical(options, keyed.region))
    if isinstance(found, DoesNotFit):
        raise found
    return relabel(found, keyed.region)


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
    keyed, own = _Keyed(plain), canonical(options, region)
    found = [_priced(keyed, mesh, own, price) for price in sorted({*prices})]
    found.sort(key=lambda p: (step_seconds(p, region.microbatches), p.memory.peak))
    front: list[ShardingPlan] = []
    for each in found:
        if not front or each.memory.peak < front[-1].memory.peak:
            front.append(each)
    return tuple(relabel(each, region) for each in front)


@dataclass(frozen=True, eq=False)
class _Keyed:
    """A region that is compared by its key only, which is found out when there is another one of its size."""

    region: Region

    @functools.cached_property
    def key(self) -> str:
        return region_key(self.region)

    @functools.cached_property
    def _size(self) -> tuple[int, int]:
        return len(self.region.equations), len(self.region.values)

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, _Keyed) and self._size == other._size and self.key == other.key

    def __hash__(self) -> int:
        return hash(self._size)


@dataclass(frozen=True, eq=False)
class Same:
    """A graph that is compared by identity: comparing what it holds would take longer than what is saved."""

    graph: Graph

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.graph is other.graph

    def __hash__(self) -> int:
        return id(self.graph)


@functools.lru_cache(maxsize=4)
def _keyed(same: Same, equations: tuple[int, ...]) -> _Keyed:
    """The region of some equations, with its key: one step is often planned again with other options."""
    return _Keyed(extract(same.graph, equations))


@functools.lru_cache(maxsize=256)
def _tried(keyed: _Keyed, mesh: Mesh, options: Options) -> ShardingPlan | DoesNotFit:
    """The plan of a region, or why there is none: either is found out once."""
    below = _below(keyed, mesh, replace(options, ceiling=math.inf))
    if below:
        return below[-1]
    try:
        found = _planned(keyed, mesh, options)
    except DoesNotFit as error:
        return error.with_traceback(None)
    if found.objective < options.ceiling < math.inf:
        below.append(found)
    return found


@functools.lru_cache(maxsize=256)
def _below(keyed: _Keyed, mesh: Mesh, options: Options) -> list[ShardingPlan]:
    """The plan of a region that was found below a ceiling, if any: then it is what is found without one."""
    return []


class Promise(NamedTuple):
    """Seconds that hardly a plan within the limit takes less than, and that none does which keeps gathered
    state: infinite where none fits."""

    seconds: float
    bound: float


def promise(
    graph: Graph, equations: Iterable[int], mesh: Mesh, options: Options, thorough: bool = False
) -> Promise:
    """Returns what can be expected of the plan with these arguments, which is found out much faster.

    thorough: whether some time is spent on the bound.
    """
    keyed = _keyed(Same(graph), tuple(equations))
    own = replace(canonical(options, keyed.region), regather=bool(options.regather))
    setting = _prepared(keyed, mesh, own)
    limit, free = limit_of(setting.options, setting.mesh), setting.free(setting.options.memory_price)
    if free.chosen is None or setting.memory(free.chosen).peak <= limit:
        return Promise(free.bound, free.bound)
    patience = setting.options.seconds if thorough and len(setting.model.nodes) <= WATCHED else 0.0
    bound = proven(setting, limit, patience)
    seconds = max(free.bound, expected(setting, limit), promised(setting, limit))
    return Promise(seconds, max(free.bound, bound))


def keeping(
    graph: Graph,
    equations: Iterable[int],
    mesh: Mesh,
    options: Options,
    price: float,
    enough: float = math.inf,
) -> float:
    """Returns seconds that no plan within the limit goes below that keeps the results of products, whatever
    else it computes again.

    Args:
        graph: nothing is computed again. equations, mesh, options: as for `plan`. price: of a byte, in
            seconds; any gives a bound. enough: seconds; no more need be proven.
    """
    keyed = _keyed(Same(graph), tuple(equations))
    setting = _prepared(keyed, mesh, replace(canonical(options, keyed.region), regather=False))
    return keeping_products(setting, price, limit_of(setting.options, mesh), enough)


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
    twice = any(e.phase is Phase.BACKWARD for e in keyed.region.equations)
    if options.regather is not None or not (keyed.region.whole and twice):
        return _solve(_prepared(keyed, mesh, options))
    setting = _prepared(keyed, mesh, replace(options, regather=False))
    again = replace(options, regather=True)
    try:
        kept = _solve(setting)
    except DoesNotFit as error:
        hopeless = promised(setting, limit_of(options, mesh)) > FARTHER * options.ceiling
        other = _prepared(keyed, mesh, again)
        if (
            error.least is not None or hopeless or alike(setting, other)
        ):  # whatever is moved, that fits no better
            raise
        return _solve(other)
    if kept.objective <= (1 + options.gap) * setting.free(options.memory_price).objective:
        return kept
    if setting.deep and kept.gap <= FAR:
        return kept
    ceiling = min(kept.objective, options.ceiling)
    other = _prepared(keyed, mesh, replace(again, ceiling=ceiling))
    limit = limit_of(options, mesh)
    if alike(setting, other):
        return kept
    if promised(setting, limit) > FARTHER * ceiling:
        return replace(kept, bound=min(kept.bound, max(0.0, proven(other, limit))))
    try:
        moved = _solve(other)
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
    return _solve(_prepared(keyed, mesh, options), price, bounded=options.limit is not None)


def _prepared(keyed: _Keyed, mesh: Mesh, options: Options) -> Setting:
    """The choice model of a region; one is made for all limits and prices."""
    check_options(options)
    plain = replace(options, limit=None, memory_price=0.0, gap=0.0, seconds=1.0, share=True, ceiling=math.inf)
    return replace(_models(keyed, mesh, plain), options=options)


@functools.lru_cache(maxsize=24)  # these are big; one is needed again only for other limits and prices
def _models(keyed: _Keyed, mesh: Mesh, options: Options) -> Setting:
    if options.pinned:
        return pinned(_models(keyed, mesh, replace(options, pinned=())), options)
    return prepare(keyed.region, mesh, options)


def step_seconds(plan: ShardingPlan, microbatches: int) -> float:
    """Returns the seconds of one step: every micro-batch forward and backward, then the update."""
    return microbatches * (plan.forward + plan.backward) + plan.apply


def _solve(setting: Setting, price: float | None = None, bounded: bool = True) -> ShardingPlan:
    options = setting.options
    price = options.memory_price if price is None else price
    limit = limit_of(options, setting.mesh) if bounded else None
    solved = setting.free(price)
    fits = solved.chosen is not None and (limit is None or setting.memory(solved.chosen).peak <= limit)
    if limit is not None and not fits:
        solved = fitting(setting, price, limit)
    if solved.chosen is None:
        solved = leanest(setting)
    return _finish(setting, solved, price)


def _finish(setting: Setting, solved: Solved, price: float) -> ShardingPlan:
    """Returns the plan of a choice, in the region's ids; of one that fits a limit and was known without, the
    same."""
    assert solved.chosen is not None
    key = "plan", solved, price, setting.options.gap
    if key not in setting.known:
        setting.known[key] = _read(setting, solved, price)
    return replace(setting.known[key], memory=setting.memory(solved.chosen))


def _read(setting: Setting, solved: Solved, price: float) -> ShardingPlan:
    """Returns what a choice means, as a plan."""
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
        held=tuple(sorted((v, of, grid.spec(x)) for (_, v), ((_, of), x) in out.held.items())),
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
        held=tuple(sorted((region.ids[v], region.ids[of], spec) for v, of, spec in plan.held)),
    )
