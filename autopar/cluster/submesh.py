"""Submeshes: the sets of devices a stage may take, as logical meshes, and where in the cluster they go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from autopar.cluster.cluster import Cluster, Node
from autopar.core.errors import ClusterError
from autopar.core.mesh import Axis, Device, Mesh

AXES = ("x", "y", "z")


@dataclass(frozen=True)
class MeshChoice:
    """A kind and number of devices in one logical shape. nodes: whole nodes it spans, 1 inside a node."""

    kind: str
    devices: int
    nodes: int
    mesh: Mesh


def submeshes(cluster: Cluster) -> tuple[MeshChoice, ...]:
    """Returns every submesh a stage may take, per kind from small to large.

    Inside a node: powers of two and the whole node; over nodes: powers of two of equal whole nodes, and all.
    Each in its one-axis shape and in two-axis shapes (between nodes × inside a node; inside a node 2 × half).
    """
    choices: list[MeshChoice] = []
    for kind in cluster.kinds:
        nodes = [n for n in cluster.nodes if n.device.name == kind]
        for count in sorted({c for node in nodes for c in _sizes(node.count)}):
            choices += [MeshChoice(kind, count, 1, m) for m in inside(nodes[0].device, count)]
        for per_node in sorted({n.count for n in nodes}):
            equal = [n for n in nodes if n.count == per_node]
            for many in _sizes(len(equal)):
                if many > 1:
                    choices += [
                        MeshChoice(kind, many * per_node, many, m) for m in _across(cluster, equal[:many])
                    ]
    return tuple(choices)


def _sizes(count: int) -> list[int]:
    """Powers of two up to count, and count itself."""
    return sorted({1 << k for k in range(count.bit_length())} | {count})


def inside(device: Device, count: int) -> list[Mesh]:
    """Returns the logical meshes of `count` devices of one node: count, and 2 × count/2 for even counts."""

    def mesh(*sizes: int) -> Mesh:
        return Mesh(
            device, tuple(Axis(AXES[i], n, device.link, device.link_latency) for i, n in enumerate(sizes))
        )

    if count == 1:
        return [mesh(1)]
    return [mesh(count), mesh(2, count // 2)] if count % 2 == 0 and count > 2 else [mesh(count)]


def _across(cluster: Cluster, nodes: Sequence[Node]) -> list[Mesh]:
    """Between nodes the network card is shared by the node's devices, all of which talk at once."""
    kind, per_node = nodes[0].device, nodes[0].count
    slow = min(cluster.bandwidth(a, b) for a in nodes for b in nodes if a.name != b.name)
    outer = Axis(AXES[0], len(nodes), slow / per_node, cluster.latency)
    if per_node == 1:
        return [Mesh(kind, (outer,))]
    return [Mesh(kind, (outer, Axis(AXES[1], per_node, kind.link, kind.link_latency)))]


def shaped(cluster: Cluster, shape: Sequence[int]) -> MeshChoice:
    """Returns all devices of a one-kind cluster as a mesh of the given shape.

    The first axis runs between nodes if its size is the number of nodes; on a cluster of several nodes whose
    shape does not say so, every axis may cross nodes and is as slow as the network.

    Raises:
        ClusterError: the shape has another number of devices, or the nodes are unlike.
    """
    nodes, kind = cluster.nodes, cluster.nodes[0].device
    if len({(n.device, n.count) for n in nodes}) > 1:
        raise ClusterError(f"one mesh needs nodes that are alike, got {cluster}")
    if math.prod(shape) != cluster.size:
        raise ClusterError(
            f"a mesh of {'×'.join(map(str, shape))} is not the cluster's {cluster.size} devices"
        )
    slow = min((cluster.bandwidth(a, b) for a in nodes for b in nodes if a.name != b.name), default=kind.link)
    aligned = len(nodes) == 1 or shape[0] == len(nodes)
    fast = Axis("", 1, kind.link, kind.link_latency)
    outer = fast if len(nodes) == 1 else Axis("", 1, slow / nodes[0].count, cluster.latency)
    axes = tuple(
        replace(outer if i == 0 or not aligned else fast, name=name, size=size)
        for i, (name, size) in enumerate(zip(AXES, shape, strict=False))
    )
    return MeshChoice(kind.name, cluster.size, len(nodes), Mesh(kind, axes))


def place(cluster: Cluster, choices: Sequence[MeshChoice]) -> tuple[tuple[tuple[str, int], ...], ...]:
    """Returns for each choice, in pipeline order, its devices as (node name, index in the node).

    Large choices are put first, each into the fullest node it fits, so that powers of two always pack.

    Raises:
        ClusterError: the choices cannot be packed into the nodes.
    """
    free = {node.name: list(range(node.count)) for node in cluster.nodes}
    placed: dict[int, tuple[tuple[str, int], ...]] = {}
    for i in sorted(range(len(choices)), key=lambda i: -choices[i].devices):
        placed[i] = _put(cluster, choices[i], free)
    return tuple(placed[i] for i in range(len(choices)))


def _put(cluster: Cluster, choice: MeshChoice, free: dict[str, list[int]]) -> tuple[tuple[str, int], ...]:
    mine = [n for n in cluster.nodes if n.device.name == choice.kind]
    if choice.nodes > 1:
        per_node = choice.devices // choice.nodes
        whole = [n for n in mine if n.count == per_node == len(free[n.name])][: choice.nodes]
        if len(whole) == choice.nodes:
            return tuple((n.name, d) for n in whole for d in _take(free[n.name], per_node))
    else:
        fits = sorted(
            (n for n in mine if len(free[n.name]) >= choice.devices), key=lambda n: len(free[n.name])
        )
        if fits:
            return tuple((fits[0].name, d) for d in _take(free[fits[0].name], choice.devices))
    raise ClusterError(
        f"{choice.devices} × {choice.kind} on {choice.nodes} node(s) cannot be placed beside the others"
    )


def _take(free: list[int], count: int) -> list[int]:
    taken, free[:] = free[:count], free[count:]
    return taken
