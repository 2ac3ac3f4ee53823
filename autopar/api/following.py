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

if TYPE_CHECKING:
    from autopar.api.exact import Made

Pins = tuple[tuple[int, Spec], ...]


def made_of(made: Made | None, method: str) -> Made:
    """Returns the plan of the step that is followed, with its trace.

    Raises:
        BadInput: it has not been planned.
    """
    if made is None:
        raise BadInput(
            f"{method} needs the other step's plan: call that step, or its .plan(*shapes), before this one"
        )
    return made


def mesh_of(sharding: ShardingPlan, cluster: Cluster) -> MeshChoice:
    """Returns the mesh of the other step's plan on its cluster."""
    choice = shaped(cluster, sharding.mesh.shape)
    return MeshChoice(choice.kind, choice.devices, choice.nodes, sharding.mesh)


def arguments(graph: Graph, made: Made, sharding: ShardingPlan) -> Pins:
    """Returns pins for the arguments that the other step has too, as they lie in one of its stages."""
    theirs = [v for v in made.traced.graph.inputs if v in sharding.layout]
    found = matched(graph, graph.inputs, made.traced.graph, theirs)
    return tuple((v, sharding.layout[u]) for v, u in found.items())


def results(graph: Graph, made: Made) -> dict[int, int]:
    """Returns result → the argument of the other step that it becomes.

    Raises:
        BadInput: no result is an argument of it.
    """
    made_here = [v for v in dict.fromkeys(graph.outputs) if v is not None]
    found = matched(graph, made_here, made.traced.graph, made.traced.graph.inputs)
    if not found and any(graph.values[v].shape for v in made_here):
        raise BadInput(
            "CreateState: no result of this function has the path and shape of an argument of the step; it "
            "should return that step's state, as the same tree"
        )
    return found


def matched(graph: Graph, values: Sequence[int], other: Graph, theirs: Sequence[int]) -> dict[int, int]:
    """Returns value → the other step's, where they share shape, type and the end of their path.

    What begins a path is the argument's own name ("params" here, "state.params" there); of several that
    agree in all but that, the one with most of its path in common is meant.
    """
    paths = {v: tokens(other.values[v].name) for v in theirs if other.values[v].shape}
    found: dict[int, int] = {}
    for v in values:
        value, mine = graph.values[v], tokens(graph.values[v].name)
        alike = {
            u: _common(mine, path)
            for u, path in paths.items()
            if other.values[u].shape == value.shape and other.values[u].dtype == value.dtype
        }
        best = max(alike, key=lambda u: (alike[u], -len(paths[u])), default=None)
        if best is not None and alike[best] >= max(1, len(mine) - 1):
            found[v] = best
    return found


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """How many parts two paths have in common at their ends."""
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return count
