"""A cluster: nodes of devices and the network between, from a YAML file or a short form ("8xA100,4xT4")."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import yaml

from autopar.cluster import units
from autopar.cluster.devices import device
from autopar.core.errors import ClusterError
from autopar.core.mesh import Device
from autopar.core.plan import Link

DEFAULT_NETWORK = units.bandwidth("25Gbps")
DEFAULT_LATENCY = 50e-6
PER_NODE = 8


@dataclass(frozen=True)
class Node:
    """One machine: `count` devices of one kind. `group`: the entry of the cluster file it came from."""

    name: str
    device: Device
    count: int
    group: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ClusterError(f"node {self.name}: expected at least one device, got {self.count}")


@dataclass(frozen=True)
class Cluster:
    """Nodes and the network.

    Attributes:
        nodes: the machines; names are unique.
        network: bytes/s between two nodes, per pair of groups (a square matrix), or one number for all.
        latency: seconds for a message between nodes.
    """

    nodes: tuple[Node, ...]
    network: tuple[tuple[float, ...], ...] | float = DEFAULT_NETWORK
    latency: float = DEFAULT_LATENCY

    def __post_init__(self) -> None:
        if not self.nodes:
            raise ClusterError("a cluster needs at least one node; for example: 8xV100-16GB,4xT4")
        rows = self.network if isinstance(self.network, tuple) else ((self.network,),)
        wrong = [x for row in rows for x in row if not (x > 0 and math.isfinite(x))]
        if wrong or not (self.latency >= 0 and math.isfinite(self.latency)):
            got = f"network of {wrong[0]} bytes/s" if wrong else f"latency of {self.latency} s"
            raise ClusterError(f"bandwidths must be positive and finite, latencies ≥ 0, got a {got}")
        twice = [name for name, n in Counter(node.name for node in self.nodes).items() if n > 1]
        if twice:
            raise ClusterError(f"node names must differ; {', '.join(twice)} came more than once")
        clash = [k for k in self.kinds if len({n.device for n in self.nodes if n.device.name == k}) > 1]
        if clash:
            raise ClusterError(
                f"device {clash[0]} is described in two ways; give the overridden one a name of its own"
            )

    @cached_property
    def kinds(self) -> tuple[str, ...]:
        """Names of the device kinds, in the order of the nodes."""
        return tuple(dict.fromkeys(node.device.name for node in self.nodes))

    @cached_property
    def available(self) -> dict[str, int]:
        """How many devices there are of each kind."""
        return {k: sum(n.count for n in self.nodes if n.device.name == k) for k in self.kinds}

    @property
    def size(self) -> int:
        return sum(node.count for node in self.nodes)

    @property
    def memory(self) -> int:
        """Usable bytes of all devices together."""
        return sum(node.count * node.device.memory for node in self.nodes)

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def device(self, kind: str) -> Device:
        return next(node.device for node in self.nodes if node.device.name == kind)

    def bandwidth(self, a: Node, b: Node) -> float:
        """Returns bytes/s from node a to node b (inside a node: one device's link)."""
        if a.name == b.name:
            return a.device.link
        return self.network[a.group][b.group] if isinstance(self.network, tuple) else self.network

    def link(self, kind_a: str, kind_b: str) -> tuple[float, float]:
        """Returns (bytes/s, latency in seconds) from a stage on kind a to one on kind b, not yet placed.

        The slowest pair of nodes; a kind that has one node only is linked to itself inside the node.
        """
        pairs = [
            (a, b)
            for a in self.nodes
            for b in self.nodes
            if (a.device.name, b.device.name) == (kind_a, kind_b) and a.name != b.name
        ]
        if not pairs:
            inside = self.device(kind_a)
            return inside.link, inside.link_latency
        return min(self.bandwidth(a, b) for a, b in pairs), self.latency

    def between(self, source: int, to: int, a: tuple[str, ...], b: tuple[str, ...]) -> Link:
        """Returns the link between two placed stages that span the nodes named in a and b."""
        pairs = [(self.node(x), self.node(y)) for x in a for y in b]
        if all(x.name == y.name for x, y in pairs):
            return Link(source, to, pairs[0][0].device.link, pairs[0][0].device.link_latency)
        return Link(source, to, min(self.bandwidth(x, y) for x, y in pairs if x.name != y.name), self.latency)

    def __str__(self) -> str:
        groups = Counter((node.device.name, node.count) for node in self.nodes)
        nodes = " + ".join(f"{n} × {count}x{kind}" for (kind, count), n in groups.items())
        net = min(map(min, self.network)) if isinstance(self.network, tuple) else self.network
        return f"{nodes}, {net * 8 / 1e9:g} Gbps between nodes"


def parse(text: str) -> Cluster:
    """Returns the cluster of a short form ("8xA100-40GB,16xV100-16GB,4xT4") or of a YAML file's path.

    In the short form each part becomes nodes of up to eight devices, with 25 Gbps between nodes.

    Raises:
        ClusterError: neither of the two, or contradictory. UnknownName: a device that is not in the database.
    """
    if text.endswith((".yaml", ".yml")) or os.path.exists(text):
        return load(text)
    nodes: list[Node] = []
    for group, part in enumerate(re.split(r"[,+]", text)):
        found = re.fullmatch(r"\s*(\d+)\s*[x×*]\s*([\w.-]+)\s*", part)
        if found is None:
            raise ClusterError(
                "expected a cluster file (*.yaml) or parts like 8xA100-40GB joined by commas, "
                f"got {part!r} in {text!r}"
            )
        nodes += _machines(device(found[2]), int(found[1]), group, len(nodes))
    return Cluster(tuple(nodes))


def _machines(kind: Device, count: int, group: int, first: int) -> list[Node]:
    if count < 1:
        raise ClusterError(f"expected at least one {kind.name}, got {count}")
    sizes = [PER_NODE] * (count // PER_NODE) + ([count % PER_NODE] if count % PER_NODE else [])
    return [Node(f"n{first + i}", kind, size, group) for i, size in enumerate(sizes)]


def load(path: str) -> Cluster:
    """Returns the cluster described by a YAML file; the format is in docs/cluster-files.md.

    Raises:
        ClusterError: unreadable, or contradictory; the message names the file and the entry.
    """
    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.safe_load(file)
    except OSError as error:
        raise ClusterError(f"cannot read cluster file {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ClusterError(f"{path} is not YAML: {error}") from None
    try:
        return from_data(data)
    except ClusterError as error:
        raise ClusterError(f"{path}: {error}") from None


def from_data(data: Any) -> Cluster:
    """Returns the cluster of a cluster file's contents."""
    _keys(data, {"nodes"}, {"network", "latency"}, "the cluster")
    if not isinstance(data["nodes"], list) or not data["nodes"]:
        raise ClusterError("nodes: expected a list such as [{device: T4, per_node: 4, count: 2}]")
    nodes: list[Node] = []
    for group, entry in enumerate(data["nodes"]):
        nodes += _entry(entry, group, len(nodes))
    latency = units.seconds(data["latency"]) if "latency" in data else DEFAULT_LATENCY
    return Cluster(tuple(nodes), _network(data.get("network", "25Gbps"), len(data["nodes"])), latency)


def _keys(data: Any, needed: set[str], allowed: set[str], where: str) -> None:
    if not isinstance(data, dict):
        raise ClusterError(f"{where}: expected keys {', '.join(sorted(needed | allowed))}, got {data!r}")
    if missing := needed - set(data):
        raise ClusterError(f"{where}: {', '.join(sorted(missing))} is missing")
    if extra := set(data) - needed - allowed:
        known = ", ".join(sorted(needed | allowed))
        raise ClusterError(
            f"{where}: unknown key {', '.join(map(str, sorted(extra, key=str)))}; known: {known}"
        )


def _entry(entry: Any, group: int, first: int) -> list[Node]:
    where = f"nodes[{group}]"
    _keys(entry, {"device"}, {"per_node", "count", "name", "memory", "link"}, where)
    kind, per_node, count = device(str(entry["device"])), entry.get("per_node", 1), entry.get("count", 1)
    for key, value in (("per_node", per_node), ("count", count)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ClusterError(f"{where}: {key} must be a whole number of at least 1, got {value!r}")
    if "memory" in entry:
        kind = replace(kind, memory=units.memory(entry["memory"]))
    if "link" in entry:
        kind = replace(kind, link=units.bandwidth(entry["link"]))
    name = entry.get("name")
    names = [f"{name}-{i}" if count > 1 else str(name) for i in range(count)] if name else None
    return [Node(names[i] if names else f"n{first + i}", kind, per_node, group) for i in range(count)]


def _network(data: Any, groups: int) -> tuple[tuple[float, ...], ...] | float:
    if not isinstance(data, list):
        return units.bandwidth(data)
    if len(data) != groups or any(not isinstance(row, list) or len(row) != groups for row in data):
        raise ClusterError(
            f"network: expected one bandwidth or a {groups}×{groups} matrix, one row per entry of nodes"
        )
    return tuple(tuple(units.bandwidth(x) for x in row) for row in data)
