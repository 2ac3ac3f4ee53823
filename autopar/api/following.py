"""One step's layouts taken over by another: an evaluation step's arguments, or a new state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from autopar.cluster import Cluster, MeshChoice, shaped
from autopar.core.errors import BadInput
from autopar.core.graph import Graph
from autopar.core.plan import ShardingPlan
from autopar.core.spec import Spec
from autopar.sharding.explain import tokens
from autopar.trace.traced import Traced

if TYPE_CHECKING:
    from autopar.api.exact import Made

Pins = tuple[tuple[int, Spec], ...]


def sharding_of(made: Made | None, method: str) -> ShardingPlan:
    """Returns the layouts of a step that was planned before.

    Raises:
        BadInput: it has not been planned. NotImplementedError: it is a pipeline.
    """
    if made is None:
        raise BadInput(
            f"{method} needs the other step's plan: call that step, or its .plan(*shapes), before this one"
        )
    first, *more = made.plan.stages
    if more:
        raise NotImplementedError(
            f"{method} of a step in {1 + len(more)} pipeline stages is not built; plan the other step with "
            "ShardParallel, or this one with Auto(stages=…)"
        )
    return first.sharding


def mesh_of(sharding: ShardingPlan, cluster: Cluster) -> MeshChoice:
    """Returns the mesh of the other step's plan on its cluster."""
    choice = shaped(cluster, sharding.mesh.shape)
    return MeshChoice(choice.kind, choice.devices, choice.nodes, sharding.mesh)


def arguments(traced: Traced, made: Made, sharding: ShardingPlan) -> Pins:
    """Returns pins for the arguments that the other step has too."""
    return matched(traced.graph, traced.graph.inputs, made.traced.graph, made.traced.graph.inputs, sharding)


def results(traced: Traced, made: Made, sharding: ShardingPlan) -> Pins:
    """Returns pins for the results that the other step takes as arguments.

    Raises:
        BadInput: no result is an argument of it.
    """
    theirs = made.traced.graph
    made_here = [v for v in dict.fromkeys(traced.graph.outputs) if v is not None]
    found = matched(traced.graph, made_here, theirs, theirs.inputs, sharding)
    if not found and any(traced.graph.values[v].shape for v in made_here):
        raise BadInput(
            "CreateState: no result of this function has the path and shape of an argument of the step; it "
            "should return that step's state, as the same tree"
        )
    return found


def matched(
    graph: Graph, values: Sequence[int], other: Graph, theirs: Sequence[int], sharding: ShardingPlan
) -> Pins:
    """Returns (value, the other step's layout) for values that share shape, type and the end of their path.

    What begins a path is the argument's own name ("params" here, "state.params" there); of several that
    agree in all but that, the one with most of its path in common is meant.
    """
    paths = {v: tokens(other.values[v].name) for v in theirs if v in sharding.layout}
    found: list[tuple[int, Spec]] = []
    for v in values:
        value, mine = graph.values[v], tokens(graph.values[v].name)
        alike = {
            u: _common(mine, path)
            for u, path in paths.items()
            if other.values[u].shape == value.shape and other.values[u].dtype == value.dtype
        }
        best = max(alike, key=lambda u: (alike[u], -len(paths[u])), default=None)
        if best is not None and alike[best] >= max(1, len(mine) - 1):
            found.append((v, sharding.layout[best]))
    return tuple(found)


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """How many parts two paths have in common at their ends."""
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count
