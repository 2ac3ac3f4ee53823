"""The rooms composed: a traced step, a cluster and a method become a plan with its predicted timeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from autopar import stages
from autopar.api.methods import Auto, DataParallel, Manual, Method, Pipeline, ShardParallel, Zero2, Zero3
from autopar.api.tracing import Tracer
from autopar.cluster import Cluster, MeshChoice, shaped, submeshes
from autopar.core import plan as nouns
from autopar.core.errors import BadInput, DoesNotFit, MixedExamples, StalePlan
from autopar.core.graph import Graph
from autopar.core.mesh import Mesh
from autopar.core.plan import ShardingPlan
from autopar.core.spec import Spec
from autopar.program import check, emit, schedule, simulate
from autopar.sharding import pins
from autopar.sharding import plan as intra
from autopar.sharding.options import Options as ShardingOptions
from autopar.sharding.region import signature
from autopar.stages.offers import Offer, replacements
from autopar.trace.traced import Traced

Say = Callable[[str], None]
Pins = Callable[[Graph, Mesh], tuple[tuple[int, Spec], ...]]


@dataclass(frozen=True)
class Made:
    """A plan and the trace it was made for."""

    plan: nouns.Plan
    traced: Traced


def make(tracer: Tracer, cluster: Cluster, method: Method, say: Say) -> Made:
    """Returns the plan of a step on a cluster.

    Raises:
        TraceError, MixedExamples: the step cannot be captured or cut into micro-batches.
        DoesNotFit: no plan keeps every device within its memory. BadInput, StalePlan: see the methods.
    """
    match method:
        case Manual(plan=plan):
            return _manual(tracer, cluster, plan)
        case ShardParallel():
            return _one_stage(tracer, cluster, method, say)
        case Auto():
            return _auto(tracer, cluster, method, say)


# -- a given plan
# ----------------------------------------------------------------------------------------------


def _manual(tracer: Tracer, cluster: Cluster, plan: nouns.Plan) -> Made:
    traced = tracer(plan.microbatches, plan.remat)
    if traced.fingerprint != plan.model:
        raise StalePlan(
            f"the plan was made for another model (its fingerprint is {plan.model[:12]}, this step's is "
            f"{traced.fingerprint[:12]}): other shapes, layers or versions; plan again"
        )
    return Made(plan, traced)


# -- one stage
# -------------------------------------------------------------------------------------------------


def _one_stage(tracer: Tracer, cluster: Cluster, method: ShardParallel, say: Say) -> Made:
    if len(cluster.kinds) > 1:
        raise BadInput(
            f"{type(method).__name__} shards over devices of one kind, but the cluster has "
            f"{', '.join(cluster.kinds)}; use autopar.Auto(), which gives each kind stages of its own"
        )
    say("tracing")
    traced = tracer(method.micro_batches, method.remat)
    best: nouns.Plan | None = None
    refused: DoesNotFit | None = None
    for choice in _whole(cluster, method.mesh):
        say(f"sharding over {choice.mesh}")
        fixed = _pins(method)(traced.graph, choice.mesh)
        options = stages.Options(stages=1, choices=(choice,), model=traced.fingerprint)
        try:
            found = stages.plan(traced.graph, cluster, _unpriced, _exact(traced.graph, fixed), options)
        except DoesNotFit as error:
            refused = error
            continue
        found = _timed(found, cluster, method.remat)
        if best is None or found.step_time < best.step_time:
            best = found
    if best is None:
        assert refused is not None
        raise refused
    return Made(best, traced)


def _whole(cluster: Cluster, mesh: tuple[int, ...] | None) -> tuple[MeshChoice, ...]:
    if mesh is not None:
        return (shaped(cluster, mesh),)
    return tuple(c for c in submeshes(cluster) if c.devices == cluster.size)


def _pins(method: ShardParallel) -> Pins:
    match method:
        case DataParallel():
            return pins.data_parallel
        case Zero2():
            return pins.zero2
        case Zero3():
            return pins.zero3
        case _:
            return lambda graph, mesh: ()


def _unpriced(layer: int, mesh: Mesh) -> tuple[Offer, ...]:
    """With one stage and one mesh there is nothing to choose, so nothing has to be priced."""
    return (Offer(0.0, 0.0, 0.0, 0.0, 0.0, 0.0),)


def _exact(graph: Graph, fixed: tuple[tuple[int, Spec], ...] = ()) -> stages.Shard:
    """The exact intra-operator plan of a stage."""

    def shard(equations: tuple[int, ...], mesh: Mesh, in_flight: int) -> ShardingPlan:
        types = replacements(mesh.device, graph)
        options = ShardingOptions(
            in_flight=in_flight, pinned=fixed, dtypes=types.dtypes, products=types.products
        )
        return intra.plan(graph, equations, mesh, options)

    return shard


# -- stages and shardings chosen
# -------------------------------------------------------------------------------


def _auto(tracer: Tracer, cluster: Cluster, method: Auto, say: Say) -> Made:
    """The best over micro-batch counts; recomputing as the method says, or where nothing fits without."""
    tracer.layers = method.layers
    if method.micro_batches is not None:
        return _fitting(tracer, cluster, method, method.micro_batches, say)
    best: Made | None = None
    refused: Exception | None = None
    for micro in _candidates(tracer):
        try:
            found = _fitting(tracer, cluster, method, micro, say)
        except (DoesNotFit, MixedExamples) as error:
            refused = refused or error
            if isinstance(error, MixedExamples):
                break
            continue
        if best is not None and found.plan.step_time > best.plan.step_time:
            break
        best = found
    if best is None:
        assert refused is not None
        raise refused
    return best


def _candidates(tracer: Tracer) -> Iterator[int]:
    """Powers of two that divide the batch, upwards: the time falls with the bubble, then grows."""
    batch, micro = tracer.batch(), 1
    while micro <= batch and batch % micro == 0:
        yield micro
        micro *= 2


def _fitting(tracer: Tracer, cluster: Cluster, method: Auto, micro: int, say: Say) -> Made:
    if method.remat is not None:
        return _pipeline(tracer, cluster, method, micro, method.remat, say)
    try:
        return _pipeline(tracer, cluster, method, micro, False, say)
    except DoesNotFit as error:
        without = error
    try:
        found = _pipeline(tracer, cluster, method, micro, True, say)
    except DoesNotFit as error:
        raise (error if (error.missing or 0) <= (without.missing or 0) else without) from None
    note = "activations are recomputed in the backward pass: nothing fits otherwise"
    return Made(replace(found.plan, notes=(note, *found.plan.notes)), found.traced)


def _pipeline(tracer: Tracer, cluster: Cluster, method: Auto, micro: int, remat: bool, say: Say) -> Made:
    words = f"{micro} micro-batch{'es' * (micro > 1)}{', recomputing' * remat}"
    say(f"{words}: tracing")
    traced = tracer(micro, remat)
    say(f"{words}: pricing {len(traced.graph.layers)} layers")
    options = stages.Options(
        schedule=method.schedule,
        stages=method.stages,
        choices=_whole_nodes(cluster) if method.whole_nodes else None,
        min_stages=2 if isinstance(method, Pipeline) and method.stages is None else 1,
        model=traced.fingerprint,
    )
    found = stages.plan(traced.graph, cluster, prices(traced.graph, say), _exact(traced.graph), options)
    return Made(_timed(found, cluster, remat), traced)


def _whole_nodes(cluster: Cluster) -> tuple[MeshChoice, ...]:
    full = {kind: max(n.count for n in cluster.nodes if n.device.name == kind) for kind in cluster.kinds}
    return tuple(c for c in submeshes(cluster) if c.nodes > 1 or c.devices == full[c.kind])


def prices(graph: Graph, say: Say) -> stages.Price:
    """Returns the price of a layer on a mesh: the intra-operator planner's offers, once for equal layers."""
    members: dict[int, list[int]] = {}
    for i, equation in enumerate(graph.equations):
        if equation.layer is not None or not graph.layers:
            members.setdefault(equation.layer or 0, []).append(i)
    signatures = {layer: signature(graph, own) for layer, own in members.items()}
    known: dict[tuple[str, Mesh], tuple[Offer, ...]] = {}

    def price(layer: int, mesh: Mesh) -> tuple[Offer, ...]:
        key = (signatures.get(layer, ""), mesh)
        if key not in known:
            say(f"pricing layers on {mesh}")
            types = replacements(mesh.device, graph)
            options = ShardingOptions(uniform=True, dtypes=types.dtypes, products=types.products)
            plans = intra.offers(graph, members.get(layer, ()), mesh, options)
            known[key] = tuple(map(_offer, plans))
        return known[key]

    return price


def _offer(plan: ShardingPlan) -> Offer:
    m = plan.memory
    return Offer(plan.forward, plan.backward, plan.apply, m.state, m.activations, m.workspace)


def _timed(plan: nouns.Plan, cluster: Cluster, remat: bool) -> nouns.Plan:
    """The plan with its program checked and simulated."""
    plan = replace(plan, cluster=str(cluster), remat=remat)
    program = emit(plan, schedule(plan.schedule, len(plan.stages), plan.microbatches))
    check(program)
    line = simulate(plan, program)
    return plan.with_timing(line.step_time, line.bubble)
