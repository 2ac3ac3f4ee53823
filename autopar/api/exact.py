"""What planning of every method shares: the exact plan of a stage, and a plan with its simulated time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from autopar import stages
from autopar.cluster import Cluster
from autopar.core import plan as nouns
from autopar.core.graph import Graph, Remat
from autopar.core.mesh import Mesh
from autopar.core.plan import ShardingPlan
from autopar.core.spec import Spec
from autopar.core.stopwatch import section
from autopar.program import emit, schedule, simulate
from autopar.sharding import plan as intra
from autopar.sharding.options import Options
from autopar.stages.offers import replacements
from autopar.trace.either import Remats, ways
from autopar.trace.traced import Traced

Say = Callable[[str], None]
Pins = tuple[tuple[int, Spec], ...]

GAP = 1e-3
"""How near to the optimum a stage's sharding has to be proven before the solver stops."""

SECONDS = 1.5
"""Time for the sharding of one stage; it is only used up where the memory limit binds."""


@dataclass(frozen=True)
class Made:
    """A plan and the trace it was made for."""

    plan: nouns.Plan
    traced: Traced


def stage_options(graph: Graph, mesh: Mesh, pinned: Pins = (), in_flight: int = 1) -> Options:
    """Returns what the exact plan of a stage is asked for."""
    types = replacements(mesh.device, graph)
    return Options(
        in_flight=in_flight,
        pinned=pinned,
        gap=GAP,
        seconds=SECONDS,
        dtypes=types.dtypes,
        products=types.products,
    )


def exact(graph: Graph, pinned: Pins = ()) -> stages.Shard:
    """Returns the exact intra-operator plan of a stage, as `stages.plan` asks for it."""

    def shard(equations: tuple[int, ...], mesh: Mesh, in_flight: int) -> ShardingPlan:
        return intra.plan(graph, equations, mesh, stage_options(graph, mesh, pinned, in_flight))

    return shard


def timed(plan: nouns.Plan, cluster: Cluster, remat: Remats, layer_scans: bool) -> nouns.Plan:
    """Returns the plan with its program simulated, which checks it as well."""
    taken = ((layer, ways(remat, layer)[0]) for layer in plan.layers or ("",))
    again = tuple(each for each in taken if each[1] is not Remat.NONE)
    plan = replace(plan, cluster=str(cluster), remat=again, layer_scans=layer_scans)
    with section("emit"):
        program = emit(plan, schedule(plan.schedule, len(plan.stages), plan.microbatches))
        line = simulate(plan, program)
    return plan.with_timing(line.step_time, line.bubble)
