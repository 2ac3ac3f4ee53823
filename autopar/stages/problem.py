"""The stage program of a graph: seconds and bytes of every run of layers on every submesh, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from autopar.cluster import Cluster, MeshChoice
from autopar.core.graph import Graph, Phase
from autopar.stages.offers import Offer, Options, Price
from autopar_solver.stage_dp import StageProblem, SubmeshChoice, gpipe, inference, one_f_one_b

Array = NDArray[np.float64]


MOST_ENTRIES = 20_000_000
"""Entries of one array of the stage program (it has four, of 8 bytes each)."""

RUNS = ("time", "fixed", "memory_fixed", "memory_per_microbatch")
"""The arrays of a stage problem that have an entry per run of layers."""


@dataclass(frozen=True)
class Program:
    """A stage problem and what its indices stand for.

    Attributes:
        problem: as the solver takes it. Its choices are submeshes × offers. If at least n > 1 stages are
            wanted, its layers are n copies of the chain of layers in a row (see `_staged`).
        choices: submesh per problem choice.
        cuts: the boundaries between the graph's layers at which stages may begin and end, both ends included.
        rows: how many times the chain is there before the last.
    """

    problem: StageProblem
    choices: tuple[MeshChoice, ...]
    cuts: tuple[int, ...]
    rows: int

    @property
    def layers(self) -> int:
        return self.cuts[-1]

    def stages(self, stages: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
        """Returns the (start, stop, choice) of a solution in layers of the graph."""
        wide = len(self.cuts)
        return tuple((self.cuts[i % wide], self.cuts[j % wide], c) for i, j, c in stages)

    def forbid(self, start: int, stop: int, choice: int, in_flight: int) -> Program:
        """Returns the program without this run on this submesh where so many micro-batches are in flight.

        Longer runs that contain it need at least as much memory, so they go too, and so do further positions.
        """
        per = self.problem.memory_per_microbatch.copy()
        fixed, limit = self.problem.memory_fixed, self.problem.limit
        count = self.problem.layers
        place = np.array(self.cuts)[np.arange(count + 1) % len(self.cuts)]
        first, last = place[:-1, None], place[None, :]
        longer = (first <= start) & (last >= stop)
        for c, other in enumerate(self.choices):
            if other == self.choices[choice]:
                over = (np.maximum(limit[c] - fixed[c], 0.0) + 1.0) / in_flight * (1 + 1e-9)
                per[c] = np.where(longer, np.maximum(per[c], over), per[c])
        return replace(self, problem=replace(self.problem, memory_per_microbatch=per))

    def forbid_choice(self, choice: int) -> Program:
        """Returns the program without this submesh."""
        time = self.problem.time.copy()
        for c, other in enumerate(self.choices):
            if other == self.choices[choice]:
                time[c] = np.inf
        return replace(self, problem=replace(self.problem, time=time))


def build(
    graph: Graph, cluster: Cluster, choices: tuple[MeshChoice, ...], price: Price, options: Options
) -> Program:
    """Returns the stage program of a graph on a cluster."""
    layers, kinds = max(1, len(graph.layers)), cluster.kinds
    submeshes: list[MeshChoice] = []
    costs: list[Array] = []  # per choice [6, layers]: the fields of an offer
    for choice in choices:
        offers = [price(layer, choice.mesh) for layer in range(layers)]
        for rank in range(max((len(o) for o in offers), default=0)):
            submeshes.append(choice)
            costs.append(np.array([_fields(o, rank) for o in offers]).T)
    parts = np.array(costs).reshape(len(costs), 6, layers)
    time, fixed = _runs(parts[:, 0] + parts[:, 1]), _runs(parts[:, 2])
    if options.max_layers is not None:
        length = np.arange(layers + 1)[None, :] - np.arange(layers)[:, None]
        time = np.where(length > options.max_layers, np.inf, time)
    time = np.where(time > options.slowest, np.inf, time)
    problem = StageProblem(
        choices=tuple(
            SubmeshChoice(kinds.index(c.kind), c.devices, f"{c.devices} × {c.mesh}") for c in submeshes
        ),
        available=tuple(cluster.available[kind] for kind in kinds),
        time=time,
        fixed=fixed,
        memory_fixed=_runs(parts[:, 3]) + _peaks(parts[:, 5]),
        memory_per_microbatch=_runs(parts[:, 4]),
        limit=np.array([float(c.mesh.device.memory) for c in submeshes]),
        transfer=transfers(graph, cluster),
        microbatches=graph.microbatches,
        in_flight=in_flight(graph, options.schedule),
        max_stages=min(options.most or layers, layers),
    )
    rows = options.least if options.least > 1 else 0
    cuts = _cuts(layers, rows, len(submeshes))
    if len(cuts) <= layers:
        problem = _coarse(problem, cuts)
    return Program(_staged(problem, rows) if rows else problem, tuple(submeshes), cuts, rows)


def _cuts(layers: int, rows: int, choices: int) -> tuple[int, ...]:
    """Returns the boundaries at which stages may begin: all, or as many as keep a problem with rows small."""
    wide = layers + 1
    while rows and wide > rows + 1 and choices * ((rows + 1) * wide) ** 2 > MOST_ENTRIES:
        wide -= 1
    return tuple(round(k * layers / (wide - 1)) for k in range(wide))


def _coarse(problem: StageProblem, cuts: tuple[int, ...]) -> StageProblem:
    """Returns the problem in which stages begin and end at these boundaries only."""
    starts, ends = np.array(cuts[:-1]), np.array(cuts)
    arrays = {name: getattr(problem, name)[:, starts][:, :, ends] for name in RUNS}
    most = min(problem.max_stages or len(starts), len(starts))
    return replace(problem, **arrays, transfer=problem.transfer[starts], max_stages=most)


def _fields(offers: tuple[Offer, ...], rank: int) -> tuple[float, ...]:
    if not offers:
        return (np.inf,) * 6
    o = offers[min(rank, len(offers) - 1)]
    return (o.forward, o.backward, o.apply, o.state, o.activations, o.workspace)


def _runs(costs: Array) -> Array:
    """Returns [choices, L, L+1]: the sum of `costs` [choices, L] over every run [i, j); inf if one is."""
    finite = np.isfinite(costs)
    sums = _differences(np.where(finite, costs, 0.0))
    return np.where(_differences(1.0 - finite) > 0.5, np.inf, np.maximum(sums, 0.0))


def _differences(costs: Array) -> Array:
    prefix = np.concatenate([np.zeros((len(costs), 1)), np.cumsum(costs, axis=1)], axis=1)
    return prefix[:, None, :] - prefix[:, :-1, None]


def _peaks(costs: Array) -> Array:
    """Returns [choices, L, L+1]: the largest of `costs` in every run [i, j), 0 for empty ones."""
    count, layers = costs.shape
    out = np.zeros((count, layers, layers + 1))
    for i in range(layers):
        out[:, i, i + 1 :] = np.maximum.accumulate(costs[:, i:], axis=1)
    return out


def in_flight(graph: Graph, schedule: str) -> tuple[int, ...]:
    """Returns the micro-batches whose activations are held, per position from the end of the pipeline."""
    if all(e.phase is not Phase.BACKWARD for e in graph.equations):
        return inference()
    return gpipe(graph.microbatches) if schedule == "gpipe" else one_f_one_b(graph.microbatches)


def transfers(graph: Graph, cluster: Cluster) -> Array:
    """Returns [L, kinds, kinds]: seconds per micro-batch across the boundary before a layer, both ways.

    A value that several later stages read is counted at every boundary on its way. Sums that travel once a
    step (a tied embedding's gradient and new value) are not in it.
    """
    forward, backward = boundary_bytes(graph)
    kinds = cluster.kinds
    out = np.zeros((len(forward), len(kinds), len(kinds)))
    for a, kind_a in enumerate(kinds):
        for b, kind_b in enumerate(kinds):
            there, back = cluster.link(kind_a, kind_b), cluster.link(kind_b, kind_a)
            out[:, a, b] = _seconds(forward, *there) + _seconds(backward, *back)
    return out


def _seconds(nbytes: Array, bandwidth: float, latency: float) -> Array:
    return np.where(nbytes > 0, latency + nbytes / bandwidth, 0.0)


def boundary_bytes(graph: Graph) -> tuple[Array, Array]:
    """Returns the bytes per micro-batch across the boundary before each layer: of values, of cotangents."""
    layers = max(1, len(graph.layers))
    forward, backward = np.zeros(layers), np.zeros(layers)
    users = graph.consumers
    for equation in graph.equations:
        if equation.layer is None or equation.phase is Phase.APPLY:
            continue
        for v in equation.outputs:
            readers = (graph.equations[j] for j in users.get(v, ()))
            at = [e.layer for e in readers if e.layer is not None and e.phase is not Phase.APPLY]
            if at and equation.phase is Phase.FORWARD and max(at) > equation.layer:
                forward[equation.layer + 1 : max(at) + 1] += graph.values[v].nbytes
            elif at and equation.phase is Phase.BACKWARD and min(at) < equation.layer:
                backward[min(at) + 1 : equation.layer + 1] += graph.values[v].nbytes
    return forward, backward


def _staged(problem: StageProblem, rows: int) -> StageProblem:
    """Returns a problem whose plans are the plans of `problem` with at least `rows` stages.

    The chain of layers is repeated: row s holds what comes after s stages, the last row what comes after
    `rows` or more. A stage starts in row s and stops in row s + 1 (in the last row it stays), so the end of
    the last row is reached with at least `rows` stages only. Boundary (s, i) is layer s·(L+1) + i of the
    new chain.
    """
    layers, wide = problem.layers, problem.layers + 1
    count = rows * wide + layers
    spread = {name: np.zeros((len(problem.choices), count, count + 1)) for name in RUNS}
    spread["time"][:] = np.inf
    transfer = np.zeros((count, *problem.transfer.shape[1:]))
    for s in range(rows + 1):
        i, j = s * wide, min(s + 1, rows) * wide
        end = j + wide
        for name, array in spread.items():
            source = getattr(problem, name)
            empty = np.arange(wide)[None, :] <= np.arange(layers)[:, None]
            array[:, i : i + layers, j:end] = np.where(empty, np.inf if name == "time" else 0.0, source)
        transfer[i : i + layers] = problem.transfer
    return replace(problem, **spread, transfer=transfer)
