"""The Ray cluster under a session: one that is running already, or one made up of this machine for a
test drive."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

from autopar.core.errors import BackendError
from autopar.core.plan import Plan

STORE = 100 << 20
"""Bytes of each emulated node's object store."""

LOOPBACK = "127.0.0.1"
"""An emulated cluster listens nowhere else."""

QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
}


def import_ray() -> Any:
    """Returns the ray module. Raises BackendError when it is not installed."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
    except ImportError:
        raise BackendError("Ray is not installed; pip install 'autopar[ray]'") from None
    return ray


def needs(plan: Plan) -> dict[str, dict[str, int]]:
    """Returns node name → the resources that the plan's stages take of it, by device kind."""
    found: dict[str, dict[str, int]] = {}
    for stage in plan.stages:
        kind = stage.mesh.device.name
        for node, _ in stage.devices:
            found.setdefault(node, {}).setdefault(kind, 0)
            found[node][kind] += 1
    return found


def resource(kind: str) -> str:
    """Returns the custom resource that a Ray node with such devices offers: the kind's own name."""
    return kind


class Nodes:
    """A connection to a Ray cluster, and the cluster itself if it was started here. `close` undoes both."""

    def __init__(self, plan: Plan, address: str | None, emulate: bool):
        self._cluster: Any = None
        self._connected = False
        ray = self.ray = import_ray()
        try:
            if emulate and not ray.is_initialized():
                address = self._emulate(plan)
            self._connect(address)
        except BaseException:
            self.close()
            raise

    def _emulate(self, plan: Plan) -> str:
        from ray.cluster_utils import Cluster

        with _quiet(), _loopback():
            here = {"node_ip_address": LOOPBACK, "object_store_memory": STORE}
            head = {"num_cpus": 1, "include_dashboard": False, **here}
            self._cluster = Cluster(initialize_head=True, head_node_args=head)
            for kinds in needs(plan).values():
                self._cluster.add_node(num_cpus=1, resources=kinds, wait=False, **here)
            self._cluster.wait_for_nodes(60)
        return self._cluster.address

    def _connect(self, address: str | None) -> None:
        if self.ray.is_initialized():
            return
        try:
            with _quiet(), _loopback() if self._cluster is not None else contextlib.nullcontext():
                own = {"_node_ip_address": LOOPBACK} if self._cluster is not None else {}
                self.ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR", **own)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise BackendError(
                f"no Ray cluster at {address or 'auto'} ({str(error).splitlines()[0][:200]}); start one with `ray start "
                "--head`, pass its address, or use Ray(emulate=True) to try a plan on this machine"
            ) from None
        self._connected = True

    def check(self, plan: Plan) -> None:
        """Raises BackendError unless the cluster offers the devices the plan needs."""
        offered = self.ray.cluster_resources()
        wanted: dict[str, int] = {}
        for kinds in needs(plan).values():
            for kind, count in kinds.items():
                wanted[kind] = wanted.get(kind, 0) + count
        short = [
            f"{n} × {k} (it offers {offered.get(k, 0):g})" for k, n in wanted.items() if offered.get(k, 0) < n
        ]
        if short:
            raise BackendError(
                f"the Ray cluster lacks {', '.join(short)}; start each node with its devices as resources, e.g. "
                "ray start --address=… --resources='{\"T4\": 4}'"
            )

    def close(self) -> None:
        """Disconnects and stops what was started."""
        with contextlib.suppress(Exception), _quiet():
            if self._connected:
                self.ray.shutdown()
            if self._cluster is not None:
                self._cluster.shutdown()
        self._connected, self._cluster = False, None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray leaves sockets and files to the garbage collector, which warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings(
            "ignore", r"os\.fork\(\) was called", RuntimeWarning
        )  # Ray forks and then execs
        yield


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Ray takes "127.0.0.1" for "an address of this machine" and listens on that, unless told that there is one
    machine only. Linux is told the way that macOS and Windows are: by this variable, read when Ray is imported,
    here and in the processes that it starts."""
    from ray._private import ray_constants

    name, told = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER
    before = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = told
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
