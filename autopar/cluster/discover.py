"""This machine's devices as a cluster; the caller lists them, so that this room needs no JAX."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from autopar.cluster.cluster import Cluster, Node
from autopar.cluster.devices import device, device_names, match
from autopar.core.errors import UnknownName


def discover(kinds: Sequence[tuple[str, int]], memory: int | None = None) -> Cluster:
    """Returns the cluster of the devices a process sees.

    Args:
        kinds: (what the driver calls the device, index of its process) for each, e.g. ("Tesla T4", 0).
        memory: bytes of host memory that CPU devices share; the machine's own when None.

    Raises:
        UnknownName: a device that is not in the database.
    """
    nodes: list[Node] = []
    for (kind, process), count in Counter(kinds).items():
        name = match(kind)
        if name is None:
            raise UnknownName("device", kind, device_names())
        found = device(name)
        if name == "CPU":
            found = replace(
                found, memory=(memory or _host_memory()) // count, flops=_shared(found.flops, count)
            )
        nodes.append(Node(f"n{len(nodes)}" if len(set(kinds)) > 1 else f"n{process}", found, count))
    return Cluster(tuple(nodes))


def _shared(flops: tuple[tuple[str, float], ...], count: int) -> tuple[tuple[str, float], ...]:
    """Host devices share the machine's cores."""
    return tuple((dtype, rate / count) for dtype, rate in flops)


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
