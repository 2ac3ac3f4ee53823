"""`autopar.Cluster`: a cluster from a file, from a short form, or of this machine."""

from __future__ import annotations

import jax

from autopar import cluster as room


class Cluster(room.Cluster):
    """Nodes of devices and the network between them; see `autopar.cluster.Cluster` for the fields."""

    @classmethod
    def load(cls, path: str) -> Cluster:
        """Returns the cluster described by a YAML file. Raises ClusterError."""
        return cls._of(room.load(path))

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Returns the cluster of a short form such as "8xA100-40GB,4xT4", or of a YAML file. Raises
        ClusterError."""
        return cls._of(room.parse(text))

    @classmethod
    def local(cls) -> Cluster:
        """Returns the cluster of the devices that JAX sees. Raises UnknownName for one not in the
        database."""
        return cls._of(room.discover([(d.device_kind, d.process_index) for d in jax.devices()]))

    @classmethod
    def _of(cls, found: room.Cluster) -> Cluster:
        return cls(found.nodes, found.network, found.latency)
