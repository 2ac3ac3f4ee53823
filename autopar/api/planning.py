"""The rooms composed: a traced step, a cluster and a method become a plan with its predicted timeline."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from autopar import stages
from autopar.api.along import along, is_pipelined
from autopar.api.counts import best_of
from autopar.api.exact import GAP, SECONDS, Made, Say, exact, timed
from autopar.api.methods import (
    Auto,
    CreateState,
    Follow,
    Manual,
    Method,
    Pipeline,
    ShardParallel,
    remat_of,
)
from autopar.api.one_stage import one_stage
from autopar.api.tracing import Tracer
from autopar.cluster import Cluster, MeshChoice, submeshes
from autopar.core import plan as nouns
from autopar.core.errors import DoesNotFit, StalePlan
from autopar.core.graph import Graph, Remat
from autopar.core.mesh import Mesh
from autopar.core.plan import ShardingPlan
from autopar.sharding import plan as intra
from autopar.sharding.options import Options as ShardingOptions
from autopar.sharding.region import signature
from autopar.stages.forward import END
from autopar.stages.offers import Offer, Replacements, replacements
from autopar.trace.either import Remats
from autopar_solver.presolve import collector_paused

__all__ = ["GAP", "SECONDS", "Made", "Say", "layer_offers", "layers_of", "make", "prices"]

PRICE_GAP = 1e-2
"""The same for the price of a layer, which only guides the choice of stages."""

PRICE_SECONDS = 3.0
"""Seconds that the price of one layer may take."""

ROOM = 0.6
"""Share of the cluster's memory that state and one micro-batch's activations may fill before activations are
recomputed without trying to keep them: a pipeline holds several micro-batches at once."""

WORTHWHILE = 0.05
"""Seconds of work for all devices that make a micro-batch worth its latencies."""

IDLE = 0.15
"""Share of idle time from which on a plan that is short of memory is compared with one that recomputes."""


def make(tracer: Tracer, cluster: Cluster, method: Method, say: Say) -> Made:
    """Returns the plan of a step on a cluster.

    Raises:
        TraceError, MixedExamples: the step cannot be captured or cut into micro-batches.
        DoesNotFit: no plan keeps every device within its memory. BadInput, StalePlan: see the methods.
    """
    with collector_paused():  # it would walk through millions of small objects, hardly any of them in a cycle
        match method:
            case Manual(plan=nouns.Plan() as plan):
                return _manual(tracer, cluster, plan)
            case Follow() | CreateState() if is_pipelined(method):
                return along(tracer, cluster, method, say)
            case ShardParallel() | Manual() | Follow() | CreateState():
                return one_stage(tracer, cluster, method, say)
            case Auto():
                return _auto(tracer, cluster, method, say)


# -- a given plan
# ----------------------------------------------------------------------------------------------


def _manual(tracer: Tracer, cluster: Cluster, plan: nouns.Plan) -> Made:
    tracer.layer_scans = plan.layer_scans
    tracer.layers, tracer.ending = len(plan.layers), END in plan.layers
    traced = tracer(plan.microbatches, dict(plan.remat))
    if traced.fingerprint != plan.model:
        raise StalePlan(
            f"the plan was made for another model (its fingerprint is {plan.model[:12]}, this step's is "
            f"{traced.fingerprint[:12]}): other shapes, layers or versions; plan again"
        )
    return Made(plan, traced)


# -- stages and shardings chosen
# -------------------------------------------------------------------------------


def _auto(tracer: Tracer, cluster: Cluster, method: Auto, say: Say) -> Made:
    """The best over micro-batch counts; recomputing as the method says, or where nothing fits without, or
    where what fits leaves devices idle."""
    tracer.layers = method.layers
    tracer.stages = method.stages or _least(method)
    kept = _counted(tracer, cluster, method, lambda m: _fitting(tracer, cluster, method, m, say))
    if method.remat is not None or not _squeezed(tracer, kept.plan):
        return kept
    try:
        again = _counted(tracer, cluster, method, lambda m: _pipeline(tracer, cluster, method, m, True, say))
    except DoesNotFit:
        return kept
    if again.plan.step_time >= kept.plan.step_time:
        return kept
    note = (
        "activations are recomputed in the backward pass; kept, devices wait for each other and a step takes "
        f"{1e3 * kept.plan.step_time:.4g} ms"
    )
    return Made(replace(again.plan, notes=(note, *again.plan.notes)), again.traced)


def _counted(tracer: Tracer, cluster: Cluster, method: Auto, plan: Callable[[int], Made]) -> Made:
    """The best over numbers of micro-batches, or that of the number which the method says."""
    if method.micro_batches is not None:
        return plan(method.micro_batches)
    return best_of(tracer.batch(), _likely(tracer, cluster), plan)


def _squeezed(tracer: Tracer, plan: nouns.Plan) -> bool:
    """Whether a plan that computes nothing again is so short of memory that devices wait for each other."""
    if plan.bubble < IDLE or any(remat is not Remat.NONE for _, remat in plan.remat):
        return False
    tight = any(stage.sharding.memory.tight for stage in plan.stages)
    return tight and tracer.prepared(plan.microbatches).differentiates


def _likely(tracer: Tracer, cluster: Cluster) -> int:
    """A number of micro-batches to begin with: each keeps the whole cluster busy for WORTHWHILE seconds."""
    half = max((dtype for dtype, _ in cluster.nodes[0].device.flops), key=cluster.nodes[0].device.rate)
    rate = sum(node.count * node.device.rate(half) for node in cluster.nodes)
    return max(1, int(tracer.prepared(1).flops / rate / WORTHWHILE))


def _fitting(tracer: Tracer, cluster: Cluster, method: Auto, micro: int, say: Say) -> Made:
    if method.remat is not None:
        return _pipeline(tracer, cluster, method, micro, remat_of(method.remat), say)
    say(f"{micro} micro-batches: tracing")
    without = DoesNotFit("without recomputing, activations would fill most of the cluster's memory")
    if tracer.prepared(micro).least_bytes < ROOM * cluster.memory:
        try:
            return _pipeline(tracer, cluster, method, micro, False, say)
        except DoesNotFit as error:
            without = error
    try:
        found = _pipeline(tracer, cluster, method, micro, True, say)
    except DoesNotFit as error:
        raise (without if (without.missing or math.inf) < (error.missing or math.inf) else error) from None
    note = f"activations are recomputed in the backward pass; otherwise: {without}"
    return Made(replace(found.plan, notes=(note, *found.plan.notes)), found.traced)


def _pipeline(tracer: Tracer, cluster: Cluster, method: Auto, micro: int, remat: Remats, say: Say) -> Made:
    words = f"{micro} micro-batch{'es' * (micro > 1)}{', recomputing' * (remat not in (False, Remat.NONE))}"
    say(f"{words}: tracing")
    traced = tracer(micro, remat)
    say(f"{words}: pricing {len(traced.graph.layers)} layers")
    options = stages.Options(
        schedule=method.schedule,
        stages=method.stages,
        choices=_whole_nodes(cluster) if method.whole_nodes else None,
        min_stages=1 if method.stages is not None else _least(method),
        model=traced.fingerprint,
    )
    found = stages.plan(traced.graph, cluster, prices(traced.graph, say), exact(traced.graph), options)
    return Made(timed(found, cluster, remat, True), traced)


def _least(method: Auto) -> int:
    return 2 if isinstance(method, Pipeline) else 1


def _whole_nodes(cluster: Cluster) -> tuple[MeshChoice, ...]:
    full = {kind: max(n.count for n in cluster.nodes if n.device.name == kind) for kind in cluster.kinds}
    return tuple(c for c in submeshes(cluster) if c.nodes > 1 or c.devices == full[c.kind])


def prices(graph: Graph, say: Say) -> stages.Price:
    """Returns the price of a layer on a mesh: the intra-operator planner's offers, once for equal layers.

    Where one device could hold all layers in their fastest form with every micro-batch in flight, memory
    never decides, so only the fastest offer of each is made.
    """
    signatures, members = layers_of(graph)
    known: dict[tuple[str, Mesh, bool], tuple[Offer, ...]] = {}

    def offers(layer: int, mesh: Mesh, lean: bool) -> tuple[Offer, ...]:
        key = (signatures.get(layer, ""), mesh, lean)
        if key not in known:
            say(f"pricing layers on {mesh}")
            types, prices = replacements(mesh.device, graph), intra.PRICES if lean else intra.PRICES[:1]
            plans = layer_offers(graph, members.get(layer, ()), mesh, types, prices)
            known[key] = tuple(map(_offer, plans))
        return known[key]

    @functools.cache
    def scarce(mesh: Mesh) -> bool:
        fastest = [offer for layer in members for offer in offers(layer, mesh, False)]
        held = sum(offer.state + offer.activations * graph.microbatches for offer in fastest)
        return held + max((offer.workspace for offer in fastest), default=0) > mesh.device.memory

    return lambda layer, mesh: offers(layer, mesh, scarce(mesh))


def layers_of(graph: Graph) -> tuple[dict[int, str], dict[int, list[int]]]:
    """Returns layer → signature, equal for layers that cost the same, and layer → its equations."""
    members: dict[int, list[int]] = {}
    for i, equation in enumerate(graph.equations):
        if equation.layer is not None or not graph.layers:
            members.setdefault(equation.layer or 0, []).append(i)
    return {layer: signature(graph, own) for layer, own in members.items()}, members


def layer_offers(
    graph: Graph, equations: Sequence[int], mesh: Mesh, types: Replacements, prices: Sequence[float]
) -> tuple[ShardingPlan, ...]:
    """Returns the plans that a layer is priced by: one for each price of memory, in seconds per byte."""
    options = ShardingOptions(
        uniform=True, gap=PRICE_GAP, seconds=PRICE_SECONDS, dtypes=types.dtypes, products=types.products
    )
    return intra.offers(graph, equations, mesh, options, prices)


def _offer(plan: ShardingPlan) -> Offer:
    m = plan.memory
    return Offer(plan.forward, plan.backward, plan.apply, m.state, m.activations, m.workspace)
