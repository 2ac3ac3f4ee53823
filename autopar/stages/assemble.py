"""The plan as a noun, from its stages and segments: links, the values that cross segments, notes."""

from __future__ import annotations

from autopar.cluster import Cluster
from autopar.core.graph import Graph
from autopar.core.plan import Link, Plan, Stage
from autopar.core.program import Segment
from autopar.stages.cut import holders
from autopar.stages.offers import Options, replacements


def assemble(
    graph: Graph,
    cluster: Cluster,
    stages: tuple[Stage, ...],
    segments: tuple[Segment, ...],
    options: Options,
    objective: float,
    bound: float,
    notes: tuple[str, ...],
) -> Plan:
    """Returns the plan of these stages, not yet simulated."""
    crossing = {v for s in segments for v in (*s.inputs, *s.outputs)}
    crossing |= {*graph.inputs, *graph.constants} | {v for v in graph.outputs if v is not None}
    return Plan(
        model=options.model,
        layers=graph.layers,
        stages=stages,
        links=_links(graph, cluster, stages, segments),
        microbatches=graph.microbatches,
        schedule=options.schedule,
        segments=segments,
        values=tuple((v, graph.values[v]) for v in sorted(crossing)),
        inputs=graph.inputs,
        outputs=graph.outputs,
        aliases=graph.aliases,
        batch=graph.batch,
        constants=graph.constants,
        combine=graph.combine,
        objective=objective,
        bound=min(bound, objective),
        notes=(*notes, *_dtype_notes(graph, stages)),
        cluster=str(cluster),
    )


def _links(
    graph: Graph, cluster: Cluster, stages: tuple[Stage, ...], segments: tuple[Segment, ...]
) -> tuple[Link, ...]:
    """Returns a link for every ordered pair of stages of which one sends something to the other."""
    made = {v: s.stage for s in segments for v in s.outputs}
    pairs = {(made[v], s.stage) for s in segments for v in s.inputs if v in made}
    held = holders(graph, segments)
    read = {v for s in segments for v in s.inputs}
    for o, position in graph.aliases:
        old, new = graph.inputs[position], graph.outputs[o]
        if new in made:  # new state goes to every stage that holds the old; stage 0 keeps what nobody reads
            pairs |= {(made[new], s) for s in (held[old] if old in read else (0,))}
    return tuple(cluster.between(a, b, stages[a].nodes, stages[b].nodes) for a, b in sorted(pairs) if a != b)


def _dtype_notes(graph: Graph, stages: tuple[Stage, ...]) -> tuple[str, ...]:
    """Returns a note for every stage whose devices lack an element type of the graph."""
    notes: list[str] = []
    for s, stage in enumerate(stages):
        lacking = replacements(stage.mesh.device, graph)
        products = dict(lacking.products)
        for old, new in lacking.dtypes:
            product = products.get(old, new)
            notes.append(f"stage {s}: {stage.mesh.device} lacks {old}: kept as {new}, products in {product}")
    return tuple(notes)
