"""Clusters of unlike devices: the device database, cluster files, submeshes, placement and links."""

from autopar.cluster.cluster import Cluster, Node, load, parse
from autopar.cluster.devices import device, device_names, match
from autopar.cluster.discover import discover
from autopar.cluster.submesh import MeshChoice, place, shaped, submeshes

__all__ = [
    "Cluster",
    "MeshChoice",
    "Node",
    "device",
    "device_names",
    "discover",
    "load",
    "match",
    "parse",
    "place",
    "shaped",
    "submeshes",
]
