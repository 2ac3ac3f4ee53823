"""A step planned along the pipeline stages of another: an evaluation step, or the making of a state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import jax

from autopar import stages
from autopar.api import following
from autopar.api.exact import Made, Say, stage_options, timed
from autopar.api.following import Pins
from autopar.api.methods import CreateState, Follow
from autopar.api.tracing import Tracer, Traces
from autopar.cluster import Cluster
from autopar.core import plan as nouns
from autopar.core.errors import BadInput
from autopar.core.graph import Graph, Phase
from autopar.core.plan import ShardingPlan
from autopar.core.program import Segment
from autopar.sharding import plan as intra
from autopar.stages.assemble import assemble
from autopar.trace.traced import Traced


def is_pipelined(method: Follow | CreateState) -> bool:
    """Returns whether the step that is followed has several stages. Raises BadInput: it is not planned."""
    return len(following.made_of(method.step.made, type(method).__name__).plan.stages) > 1


def along(tracer: Tracer, cluster: Cluster, method: Follow | CreateState, say: Say) -> Made:
    """Returns the plan of a step on the stages of the one it follows: the same devices, the same layouts.

    Raises:
        BadInput: an evaluation step of other layers; a function that makes nothing the step takes.
        PlanError: what one stage holds is computed from what a later one does. DoesNotFit: a stage.
    """
    other = following.made_of(method.step.made, type(method).__name__)
    tracer.layer_scans, tracer.layers = other.plan.layer_scans, len(other.plan.layers)
    say("tracing")
    if isinstance(method, CreateState):
        return _creating(tracer(1, False), other, cluster)
    return _evaluating(_in_micro_batches(tracer, other), other, cluster)


def _in_micro_batches(tracer: Tracer, other: Made) -> Traced:
    """Returns the trace for as many micro-batches as the other step has, where the batch can be cut so.

    What is no argument of the other step, or a batch of it, is the batch, unless the user says what is.
    """
    whole, count = tracer(1, False), other.plan.microbatches
    if tracer.batch_argnums is None and not tracer.static_argnums:
        theirs = other.traced.graph
        known = following.matched(whole.graph, whole.graph.inputs, theirs, theirs.inputs)
        state = {v for v, u in known.items() if u not in theirs.batch}
        sizes = [len(jax.tree.leaves(argument)) for argument in tracer.args]
        leaves = iter(whole.leaves)
        values = [{v for leaf in itertools.islice(leaves, n) for v in leaf.values} for n in sizes]
        batch = tuple(k for k, own in enumerate(values) if own and not own & state)
        tracer = replace(tracer, batch_argnums=batch, traces=Traces())
    can = tracer.batch_argnums and tracer.batch() % count == 0
    return tracer(count, False) if can else whole


def _evaluating(traced: Traced, other: Made, cluster: Cluster) -> Made:
    """Each layer on the stage where the other step has it; arguments as they lie there."""
    graph, theirs = traced.graph, other.plan
    stage_of = {
        theirs.layers[k]: s for s, each in enumerate(theirs.stages) for k in range(each.start, each.stop)
    }
    unknown = [name for name in graph.layers if name not in stage_of]
    if unknown or len(graph.layers) != len(theirs.layers):
        raise BadInput(
            f"Follow: the other step has the layers {_some(theirs.layers)}, this one {_some(graph.layers)}; "
            "both have to run the same model, with the same layer names or boundaries "
            "(autopar.layer_boundary())"
        )
    runs = [(each.start, each.stop) for each in theirs.stages]
    segments = stages.cut(graph, tuple(stage_of[name] for name in graph.layers))
    pins = [following.arguments(graph, other, each.sharding) for each in theirs.stages]
    return _made(traced, other, cluster, runs, segments, pins)


def _creating(traced: Traced, other: Made, cluster: Cluster) -> Made:
    """Each part of the state on the stage that holds it; what no stage holds (a split key) is computed
    wherever it is read."""
    held, theirs = following.results(traced.graph, other), other.plan.stages
    homes = {u: s for s in reversed(range(len(theirs))) for u in theirs[s].sharding.layout}
    home = {v: homes[u] for v, u in held.items() if u in homes}
    graph = _by_home(traced.graph, home, len(theirs))
    segments = stages.cut(graph, tuple(range(len(theirs))))
    pins = [
        tuple((v, each.sharding.layout[held[v]]) for v, at in home.items() if at == s)
        for s, each in enumerate(theirs)
    ]
    runs = [(s, s + 1) for s in range(len(theirs))]
    return _made(replace(traced, graph=graph), other, cluster, runs, segments, pins)


def _by_home(graph: Graph, home: dict[int, int], count: int) -> Graph:
    """Returns the graph with one layer per stage: what makes a part of the state is in its home's."""
    equations = tuple(
        replace(e, phase=Phase.FORWARD, layer=min((home[v] for v in e.outputs if v in home), default=None))
        for e in graph.equations
    )
    return replace(graph, equations=equations, layers=tuple(f"state of stage {s}" for s in range(count)))


def _made(
    traced: Traced,
    other: Made,
    cluster: Cluster,
    runs: Sequence[tuple[int, int]],
    segments: tuple[Segment, ...],
    pins: Sequence[Pins],
) -> Made:
    """Returns the plan of these segments on the other plan's devices.

    Args:
        runs: per stage, its layers. pins: per stage, layouts of values, of which some are its own.
    """
    graph, found = traced.graph, list[nouns.Stage]()
    for s, (their, run) in enumerate(zip(other.plan.stages, runs, strict=True)):
        own = sorted({e for segment in segments if segment.stage == s for e in segment.equations})
        here = {v for e in own for v in (*graph.equations[e].operands, *graph.equations[e].outputs)}
        pinned = tuple((v, spec) for v, spec in pins[s] if v in here)
        sharding = intra.plan(graph, own, their.mesh, stage_options(graph, their.mesh, pinned))
        found.append(nouns.Stage(*run, their.devices, sharding))
    options = stages.Options(schedule=other.plan.schedule, model=traced.fingerprint)
    seconds = _seconds([stage.sharding for stage in found], graph.microbatches)
    plan = assemble(graph, cluster, tuple(found), segments, options, seconds, seconds, ())
    return Made(timed(plan, cluster, False, other.plan.layer_scans), traced)


def _seconds(shardings: Sequence[ShardingPlan], microbatches: int) -> float:
    """Returns the seconds of a step as the stage program counts them: once through, then the slowest again
    for each further micro-batch. With the stages prescribed, it is the optimum, too."""
    times = [each.forward + each.backward for each in shardings]
    return sum(times) + (microbatches - 1) * max(times) + max(each.apply for each in shardings)


def _some(names: Sequence[str], count: int = 4) -> str:
    return ", ".join(names[:count]) + (f", … ({len(names)})" if len(names) > count else "")
