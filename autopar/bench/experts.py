"""Plans that a person would write: data parallel, ZeRO, Megatron, spatial and expert parallel, and grids.

Each is a set of pinned layouts in our words. It is judged twice: as it stands, with the partitioner choosing
everything inside, and with the integer program choosing what it leaves open; the better of the two counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from autopar.bench.expert_cuts import CACHE, EXPERT_PARALLEL, STACKED
from autopar.bench.plan_cases import Case
from autopar.core.graph import Graph, OpKind, Phase
from autopar.core.mesh import Mesh
from autopar.core.spec import Spec, replicated
from autopar.sharding.pins import Pins, parameters, state

Axes = tuple[str, ...]


@dataclass(frozen=True)
class Expert:
    """A hand-written plan.

    Attributes:
        name: for people.
        data: axes that cut the batch. model: axes that cut heads and inner widths.
        experts: axes that cut the experts of a mixture. rows: axes that cut the rows of images.
        sequence: the residual stream is cut along the sequence over `model` (Korthikanti et al. 2022).
        zero: axes that also cut the optimizer state; `whole`: and the parameters (FSDP).
    """

    name: str
    data: Axes = ()
    model: Axes = ()
    experts: Axes = ()
    rows: Axes = ()
    sequence: bool = False
    zero: Axes = ()
    whole: bool = False

    def pins(self, graph: Graph, mesh: Mesh, case: Case) -> Pins:
        """Returns the layouts of the arguments and of the residual stream."""
        used = parameters(graph)
        found = [(v, self._batch(graph, v, mesh)) for v in graph.batch if graph.values[v].shape]
        for v in state(graph):
            spec = self._model(graph, v, mesh, case)
            spread = self.zero if self.whole or v not in used else ()
            found.append((v, _spread(graph, v, spec, spread, mesh)))
        return (*found, *self._stream(graph, mesh, case.hidden))

    def _batch(self, graph: Graph, v: int, mesh: Mesh) -> Spec:
        return self._row(graph, v, self.rows if len(graph.values[v].shape) == 4 else (), mesh)

    def _model(self, graph: Graph, v: int, mesh: Mesh, case: Case) -> Spec:
        value = graph.values[v]
        spec = replicated(len(value.shape))
        if re.search(CACHE, value.name) and len(value.shape) == 4:
            return _cut(value.shape, 1, self.model, mesh, _cut(value.shape, 0, self.data, mesh, spec))
        if self.experts and re.search(EXPERT_PARALLEL, value.name):
            spec = _cut(value.shape, 0, self.experts, mesh, spec)
        rest = tuple(a for a in self.model if a not in {a for dim in spec for a in dim})
        for pattern, dim in case.cuts:
            if rest and re.search(pattern, value.name):
                if -dim <= len(value.shape) - bool(re.search(STACKED, value.name)):
                    spec = _cut(value.shape, dim, rest, mesh, spec)
                break
        return spec

    def _stream(self, graph: Graph, mesh: Mesh, hidden: int | None) -> Pins:
        """The residual stream of a transformer; else, without `model`, the results of products."""
        if hidden is not None:
            along = self.model if self.sequence else ()
            return tuple((v, self._row(graph, v, along, mesh)) for v in residual(graph, hidden))
        found = () if self.model else activations(graph)
        return tuple((v, self._batch(graph, v, mesh)) for v in found)

    def _row(self, graph: Graph, v: int, along: Axes, mesh: Mesh) -> Spec:
        shape = graph.values[v].shape
        return _cut(shape, 1, along, mesh, _cut(shape, 0, self.data, mesh, replicated(len(shape))))


def experts(mesh: Mesh, case: Case) -> tuple[Expert, ...]:
    """Returns the plans worth comparing with on a mesh."""
    axes = tuple(a.name for a in mesh.axes if a.size > 1)
    found = [
        Expert("data parallel", axes),
        Expert("ZeRO-2", axes, zero=axes),
        Expert("ZeRO-3", axes, zero=axes, whole=True),
        Expert("Megatron", model=axes),
    ]
    if case.hidden is not None:
        found.append(Expert("Megatron + sequence", model=axes, sequence=True))
    if case.images:
        found.append(Expert("spatial", rows=axes))
        for data, rows in _grids(mesh, axes):
            found.append(Expert(f"data {''.join(data)} × spatial {''.join(rows)}", data, rows=rows))
    for data, model in _grids(mesh, axes):
        name = f"data {''.join(data)} × model {''.join(model)}"
        found += [
            Expert(name, data, model),
            Expert(f"{name} + ZeRO-2", data, model, zero=data),
            Expert(f"{name} + ZeRO-3", data, model, zero=data, whole=True),
        ]
        if case.hidden is not None:
            found.append(Expert(f"{name} + sequence", data, model, sequence=True))
    if case.mixture:
        found.append(Expert("expert parallel", axes, experts=axes))
        found.append(Expert("expert parallel + ZeRO-2", axes, experts=axes, zero=axes))
        for data, model in _grids(mesh, axes):
            found.append(Expert(f"data {''.join(axes)}, experts {''.join(model)}", axes, experts=model))
            found.append(
                Expert(f"data {''.join(data)}, experts × model {''.join(model)}", data, model, model)
            )
    return tuple(found)


def _grids(mesh: Mesh, axes: Axes) -> list[tuple[Axes, Axes]]:
    """Every split of the axes in two, neither empty; one of those that differ in axes that are alike."""
    found: dict[object, tuple[Axes, Axes]] = {}
    for mask in range(1, (1 << len(axes)) - 1):
        model = tuple(a for k, a in enumerate(axes) if mask >> k & 1)
        alike = tuple(sorted((mesh.axis(a).size, mesh.axis(a).bandwidth) for a in model))
        found.setdefault(alike, (tuple(a for a in axes if a not in model), model))
    return list(found.values())


def residual(graph: Graph, hidden: int) -> tuple[int, ...]:
    """Returns the sums of the residual stream: forward additions of two tensors [batch, time, hidden]."""
    size = _batch_size(graph)
    broadcast = {v for e in graph.equations if e.op == "broadcast_in_dim" for v in e.outputs}
    found: list[int] = []
    for e in graph.equations:
        shape = graph.values[e.outputs[0]].shape if e.outputs else ()
        both = len(e.operands) == 2 and all(graph.values[v].shape == shape for v in e.operands)
        sums = e.op == "add" and e.phase is Phase.FORWARD and both and not broadcast.intersection(e.operands)
        if sums and len(shape) == 3 and shape[0] == size and shape[2] == hidden:
            found.append(e.outputs[0])
    return tuple(found)


def activations(graph: Graph) -> tuple[int, ...]:
    """Returns forward results of products whose first dim is the batch."""
    size = _batch_size(graph)
    products = (e for e in graph.equations if e.kind is OpKind.CONTRACTION and e.phase is Phase.FORWARD)
    made = [e.outputs[0] for e in products]
    return tuple(v for v in made if graph.values[v].shape and graph.values[v].shape[0] == size)


def _batch_size(graph: Graph) -> int:
    return next((graph.values[v].shape[0] for v in graph.batch if graph.values[v].shape), 0)


def _cut(shape: Sequence[int], dim: int, axes: Axes, mesh: Mesh, spec: Spec) -> Spec:
    """The spec with one dim cut over those of the axes that divide what is left of it."""
    d = dim % len(shape)
    for axis in axes:
        if shape[d] and shape[d] % (mesh.ways(spec[d]) * mesh.axis(axis).size) == 0:
            spec = (*spec[:d], (*spec[d], axis), *spec[d + 1 :])
    return spec


def _spread(graph: Graph, v: int, spec: Spec, axes: Axes, mesh: Mesh) -> Spec:
    """The spec with the largest dim that all of the axes divide cut over them too (stacks stay whole)."""
    shape, free = graph.values[v].shape, tuple(a for a in axes if a not in {a for dim in spec for a in dim})
    first = 1 if re.search(STACKED, graph.values[v].name) else 0
    tried: list[Callable[[], Spec]] = [
        lambda d=d: _cut(shape, d, free, mesh, spec)
        for d in sorted(range(first, len(shape)), key=lambda d: -shape[d])
    ]
    return max((cut() for cut in tried), key=lambda s: mesh.ways(a for dim in s for a in dim), default=spec)
