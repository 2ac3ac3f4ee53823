"""Well-known methods as pinned layouts: the integer program solves what they leave open.

Data parallelism replicates all state (Li et al. 2020, PyTorch DDP); ZeRO-2 shards the optimizer state, ZeRO-3
the parameters too (Rajbhandari et al. 2020). All cut the batch over every device.
"""

from __future__ import annotations

from autopar.core.graph import Graph, Phase
from autopar.core.mesh import Mesh
from autopar.core.spec import Spec, replicated

Pins = tuple[tuple[int, Spec], ...]


def data_parallel(graph: Graph, mesh: Mesh) -> Pins:
    """Returns pins: the batch cut along dim 0, all state whole on every device."""
    whole = [(v, replicated(len(graph.values[v].shape))) for v in state(graph)]
    return (*batch(graph, mesh), *whole)


def zero2(graph: Graph, mesh: Mesh) -> Pins:
    """Returns pins: the batch and the optimizer state cut, parameters whole."""
    used = parameters(graph)
    return (
        *batch(graph, mesh),
        *((v, replicated(len(graph.values[v].shape))) for v in state(graph) if v in used),
        *((v, spread(graph, v, mesh)) for v in state(graph) if v not in used),
    )


def zero3(graph: Graph, mesh: Mesh) -> Pins:
    """Returns pins: the batch, the optimizer state and the parameters cut."""
    return (*batch(graph, mesh), *((v, spread(graph, v, mesh)) for v in state(graph)))


def state(graph: Graph) -> tuple[int, ...]:
    """Returns the tensors among the inputs that stay: arguments and constants that are not the batch."""
    coming = {*graph.batch}
    return tuple(v for v in (*graph.inputs, *graph.constants) if v not in coming and graph.values[v].shape)


def parameters(graph: Graph) -> set[int]:
    """Returns the state that forward or backward read; the rest belongs to the optimizer."""
    read = {v for e in graph.equations if e.phase is not Phase.APPLY for v in e.operands}
    return {v for v in state(graph) if v in read} | {p for _, p in graph.gradients}


def batch(graph: Graph, mesh: Mesh) -> Pins:
    """Returns pins that cut dim 0 of every batch input over as many axes as divide it."""
    tensors = [v for v in graph.batch if graph.values[v].shape]
    return tuple((v, _cut(graph.values[v].shape, 0, mesh)) for v in tensors)


def spread(graph: Graph, v: int, mesh: Mesh) -> Spec:
    """Returns a layout that cuts the largest dim which all axes divide, else the one that most axes divide.

    A stack of parameters that a loop reads slice by slice keeps its first dim whole.
    """
    shape = graph.values[v].shape
    stacked = any(
        e.loop is not None and v in e.inputs[e.loop.consts + e.loop.carries :] for e in graph.equations
    )
    dims = range(1 if stacked else 0, len(shape))
    layouts = [_cut(shape, d, mesh) for d in dims]
    if not layouts:
        return replicated(len(shape))
    return max(layouts, key=lambda spec: (mesh.ways(a for dim in spec for a in dim), _cut_size(shape, spec)))


def _cut_size(shape: tuple[int, ...], spec: Spec) -> int:
    return max((size for size, dim in zip(shape, spec, strict=True) if dim), default=0)


def _cut(shape: tuple[int, ...], d: int, mesh: Mesh) -> Spec:
    """Returns the layout that cuts dim d over the axes in order, leaving out those that do not divide what is
    left.
    """
    axes: tuple[str, ...] = ()
    for axis in mesh.axes:
        if axis.size > 1 and shape[d] > 0 and shape[d] % (mesh.ways(axes) * axis.size) == 0:
            axes = (*axes, axis.name)
    return tuple(axes if e == d else () for e in range(len(shape)))
