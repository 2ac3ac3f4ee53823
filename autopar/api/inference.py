"""Plans for inference: a decode step spread for latency, or for throughput under a latency limit, with the
largest cache that leaves.

All layers of a sequence need their keys and values, so the cache holds as many tokens as the stage with the
least room for them. Stages are therefore chosen with the memory of so many cache blocks taken off every
device, and the number of blocks is raised as long as a token does not take longer than it may.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from autopar import stages
from autopar.api.planning import GAP, SECONDS, Made, Say, layer_offers, layers_of
from autopar.cluster import Cluster, MeshChoice, submeshes
from autopar.core.dtypes import itemsize
from autopar.core.errors import BadInput, DoesNotFit
from autopar.core.graph import Graph
from autopar.core.mesh import Device, Mesh
from autopar.core.plan import Plan, ShardingPlan
from autopar.core.spec import shards
from autopar.program import emit, schedule, simulate
from autopar.sharding import plan as intra
from autopar.sharding.options import Options as ShardingOptions
from autopar.stages.offers import Offer, Replacements, replacements
from autopar.stages.problem import build
from autopar.trace.traced import Traced
from autopar_solver.stage_dp import solve_stages

PRICES = (0.0, 1e-11)
"""Seconds per byte that layers are priced at: the fastest form, and one that trades 10 ms a gigabyte."""

LEAN = 1e-13
"""Seconds per byte in exact plans: of layouts that are as fast, the leaner leaves more room for the cache."""

AMPLE = 1 << 60
"""Bytes that no device has."""

ROUNDS = 7
"""Steps of the bisection over the number of blocks, or over the slowest stage's seconds."""

WITHIN = 1e-3
"""Relative gap at which the stage program may stop."""

SOLVING = 5.0
"""Seconds that the stage program may take each time."""


@dataclass(frozen=True)
class Latency:
    """A token as soon as possible; then the largest cache for which it takes no more than `slack` longer."""

    slack: float = 0.1

    def __post_init__(self) -> None:
        if not self.slack >= 0:
            raise BadInput(f"slack is a share of the latency, 0 or more, got {self.slack!r}")


@dataclass(frozen=True)
class Throughput:
    """The shortest time on the slowest stage (so many steps in flight, one comes out in that time).

    Steps are as large as the one that is planned; a plan of fewer stages may have room for larger steps and
    give more tokens per second with a full cache, which `ServingPlan.most` predicts for both.

    Attributes:
        latency: seconds that a token may take through all stages; None: any time.
    """

    latency: float | None = None

    def __post_init__(self) -> None:
        if self.latency is not None and not self.latency > 0:
            raise BadInput(f"latency is a number of seconds above 0, got {self.latency!r}")


Goal: TypeAlias = Latency | Throughput


@dataclass(frozen=True)
class Wanted:
    """What is asked of a plan for inference.

    Attributes:
        goal: what it is to be good at. blocks: cache blocks that it has room for at least.
        stages: exactly so many; None: as many as is best.
        across: whether a stage may span nodes.
    """

    goal: Goal
    blocks: int
    stages: int | None = None
    across: bool = False


@dataclass(frozen=True)
class CacheUse:
    """What of a graph is cache.

    Attributes:
        values: inputs that are cache → bytes of one block of each.
        blocks: how many blocks they have in this graph.
    """

    values: Mapping[int, float]
    blocks: int

    def on_device(self, plan: ShardingPlan, inputs: frozenset[int] | None = None) -> float:
        """Returns bytes of one block on one device of a stage, for the inputs that its region reads."""
        found = 0.0
        for v, nbytes in self.values.items():
            spec = plan.layout.get(v)
            if spec is not None and (inputs is None or v in inputs):
                found += nbytes / shards(spec, plan.mesh)
        return found


def cache_use(traced: Traced, blocks: int) -> CacheUse:
    """Returns what of a step `(params, cache, batch)` is cache; dim 0 of its leaves are the blocks."""
    values = traced.graph.values
    found = {leaf.values[0]: leaf for leaf in traced.leaves if leaf.path.startswith("cache")}
    return CacheUse({v: values[v].nbytes / blocks for v in found}, blocks)


def plan(traced: Traced, blocks: int, cluster: Cluster, wanted: Wanted, say: Say) -> Made:
    """Returns the plan of a decode step.

    Args:
        traced: the step; its cache has `blocks` blocks, however many will be there when it runs.
        cluster: the devices. wanted: what the plan is to be good at. say: told what is being done.

    Raises:
        DoesNotFit: not even the blocks wanted fit beside the weights; says how much is missing.
        BadInput: a latency that no plan reaches.
    """
    search = _Search(traced, cache_use(traced, blocks), cluster, wanted, say)
    match wanted.goal:
        case Latency(slack=slack):
            return search.roomy(slack)
        case Throughput(latency=latency):
            return search.fast(math.inf if latency is None else latency)


def halves(device: Device, graph: Graph) -> Replacements:
    """Returns the element types that a stage uses in place of the graph's: float16 where bfloat16 lacks."""
    known = replacements(device, graph)
    kept = tuple((a, "float16" if (a, "float16") in known.products else b) for a, b in known.dtypes)
    return Replacements(kept, tuple((a, b) for a, b in known.products if (a, b) not in kept))


@dataclass(frozen=True)
class _Cost:
    """One way to run a layer: an offer without its cache, and the bytes of a cache block on one device."""

    offer: Offer
    block: float


class _Search:
    """Stage programs for one step and cluster, with more or fewer cache blocks."""

    def __init__(self, traced: Traced, cache: CacheUse, cluster: Cluster, wanted: Wanted, say: Say):
        self.traced, self.graph, self.cache = traced, traced.graph, cache
        self.cluster, self.wanted, self.say = cluster, wanted, say
        self.choices = _shapes(cluster, wanted.across)
        self._signatures, self._members = layers_of(self.graph)
        self._known: dict[tuple[str, Mesh], tuple[_Cost, ...]] = {}

    # -- what a layer costs

    def costs(self, layer: int, mesh: Mesh) -> tuple[_Cost, ...]:
        key = self._signatures.get(layer, ""), mesh
        if key not in self._known:
            self.say(f"pricing layers on {mesh}")
            types = halves(mesh.device, self.graph)
            plans = layer_offers(self.graph, self._members.get(layer, ()), mesh, types, PRICES)
            self._known[key] = tuple(map(self._cost, plans))
        return self._known[key]

    def _cost(self, found: ShardingPlan) -> _Cost:
        block, memory = self.cache.on_device(found) * width(found), found.memory
        weights = memory.state - block * self.cache.blocks
        offer = Offer(
            found.forward, found.backward, found.apply, weights, memory.activations, memory.workspace
        )
        return _Cost(offer, block)

    def price(self, blocks: int) -> stages.Price:
        """Returns the price of a layer with so many cache blocks in its state."""

        def price(layer: int, mesh: Mesh) -> tuple[Offer, ...]:
            found = self.costs(layer, mesh)
            return tuple(replace(c.offer, state=c.offer.state + blocks * c.block) for c in found)

        return price

    # -- stage programs

    def options(self, slowest: float) -> stages.Options:
        return stages.Options(
            stages=self.wanted.stages,
            choices=self.choices,
            model=self.traced.fingerprint,
            slowest=slowest,
            gap=WITHIN,
            seconds=SOLVING,
        )

    @functools.cache  # noqa: B019 (lives as long as one search)
    def latency(self, blocks: int, slowest: float = math.inf) -> float:
        """Returns the seconds of the quickest plan with so much cache and no slower stage, inf for none."""
        options = self.options(slowest)
        self.say(f"stages with room for {blocks} blocks of cache")
        program = build(self.graph, self.cluster, self.choices, self.price(blocks), options)
        found = solve_stages(program.problem, runner_ups=0, seconds=SOLVING, gap=WITHIN, explain=False)
        return found.objective

    def roomy(self, slack: float) -> Made:
        """The quickest plan, with the largest cache that costs no more than `slack` of its latency."""
        least = self.wanted.blocks
        quickest = self.latency(least)
        if not math.isfinite(quickest):
            return self.exact(least, math.inf)
        most = largest(
            lambda n: self.latency(n) <= quickest * (1 + slack), least, self._bound(), steps=ROUNDS
        )
        return self.exact(most, math.inf, least)

    def fast(self, latency: float) -> Made:
        """The plan whose slowest stage is quickest, among those that keep the latency."""
        least = self.wanted.blocks
        quickest = self.latency(least)
        if not math.isfinite(quickest):
            return self.exact(least, math.inf)
        if quickest > latency:
            raise BadInput(
                f"no plan for {self.cluster} gives a token within {1e3 * latency:.4g} ms; the quickest takes "
                f"{1e3 * quickest:.4g} ms: allow more, or use faster devices or links"
            )

        def within(blocks: int, slowest: float) -> bool:
            found = self.latency(blocks, slowest)
            return math.isfinite(found) and found <= latency

        low = quickest / self.cluster.size / 4
        seconds = smallest(lambda t: within(least, t), low, quickest, ROUNDS + 5)
        most = largest(lambda n: within(n, seconds), least, self._bound(), ROUNDS)
        return self.exact(most, seconds, least)

    def _bound(self) -> int:
        """More blocks than any plan has room for: all memory holds nothing else, cut as finely as can be."""
        fewest = sum(
            min(c.block * m.size for m in {x.mesh for x in self.choices} for c in self.costs(layer, m))
            for layer in range(max(1, len(self.graph.layers)))
        )
        return max(self.wanted.blocks, int(self.cluster.memory / max(fewest, 1.0)))

    # -- exact plans

    def exact(self, blocks: int, slowest: float, least: int | None = None) -> Made:
        """The plan with every stage sharded exactly, for fewer blocks if so many do not fit after all."""
        self.say("sharding the stages")
        while True:
            options = self.options(slowest)
            try:
                found = stages.plan(self.graph, self.cluster, self.price(blocks), self.shard(blocks), options)
            except DoesNotFit:
                if least is None or blocks <= least:
                    raise
                blocks = max(least, int(blocks * 0.9))
                continue
            return Made(timed(found, self.cluster), self.traced)

    def shard(self, blocks: int) -> stages.Shard:
        """Returns the exact plan of a stage whose devices also hold so many cache blocks."""

        def shard(equations: tuple[int, ...], mesh: Mesh, in_flight: int) -> ShardingPlan:
            read = frozenset(v for i in equations for v in self.graph.equations[i].operands)
            block = sum(nbytes for v, nbytes in self.cache.values.items() if v in read) / mesh.size
            more = int((blocks - self.cache.blocks) * block)
            limit = max(1, mesh.device.memory - max(0, more))
            types = halves(mesh.device, self.graph)
            options = ShardingOptions(
                limit=AMPLE,
                in_flight=in_flight,
                memory_price=LEAN,
                gap=GAP,
                seconds=SECONDS,
                dtypes=types.dtypes,
                products=types.products,
            )
            found = intra.plan(self.graph, equations, mesh, options)
            if found.memory.peak > limit:  # solved with the limit only where it binds: that takes much longer
                found = intra.plan(self.graph, equations, mesh, replace(options, limit=limit))
            return replace(found, memory=replace(found.memory, limit=mesh.device.memory))

        return shard


def width(plan: ShardingPlan) -> float:
    """Returns the size of a cache element as the stage keeps it, relative to the graph's."""
    for old, new in plan.dtypes:
        return itemsize(new) / itemsize(old)
    return 1.0


def largest(holds: Callable[[int], bool], low: int, high: int, steps: int) -> int:
    """Returns about the largest number for which a monotone test holds; it does for `low`."""
    for _ in range(steps):
        if high <= low + 1:
            break
        middle = max(low + 1, round(math.sqrt(low * high)))
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def smallest(holds: Callable[[float], bool], low: float, high: float, steps: int) -> float:
    """Returns about the smallest number for which a monotone test holds; it does for `high`."""
    for _ in range(steps):
        middle = math.sqrt(low * high)
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def timed(found: Plan, cluster: Cluster) -> Plan:
    """Returns the plan with its program simulated."""
    found = replace(found, cluster=str(cluster))
    line = simulate(found, emit(found, schedule(found.schedule, len(found.stages), found.microbatches)))
    return found.with_timing(line.step_time, line.bubble)


def _shapes(cluster: Cluster, across: bool) -> tuple[MeshChoice, ...]:
    """The submeshes of one axis inside a node, and those over nodes if wanted: decoding is cut one way."""
    return tuple(
        c for c in submeshes(cluster) if (c.nodes == 1 and len(c.mesh.axes) == 1) or (across and c.nodes > 1)
    )
