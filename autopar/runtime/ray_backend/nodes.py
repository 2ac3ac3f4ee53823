"""The Ray cluster under a session: one that is running already, or one made up of this machine for a try.

A process has one connection to Ray at most, so its sessions share it, and the emulated cluster with it: the
first makes both, the last to close ends both.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from autopar.core.errors import BackendError
from autopar.core.mesh import Mesh
from autopar.core.plan import Plan
from autopar.runtime.ray_backend.emulated import LOOPBACK, Emulated

CONNECT = 5.0
"""Seconds in which a cluster's address is reached."""

SETTLE = 2.0
"""Seconds after which devices that a closed session had are free again."""

START = 120.0
"""Seconds in which devices for all stages are found, and then all workers have started."""


@dataclass
class _Shared:
    """What this process has of Ray: how many sessions use it, and what was begun here."""

    users: int = 0
    connected: bool = False
    emulated: Emulated | None = None


_SHARED = _Shared()


def import_ray() -> Any:
    """Returns the ray module. Raises BackendError when it is not installed."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # asked for at import, with a warning
    try:
        with _quiet():
            import ray
    except ImportError:
        raise BackendError("Ray is not installed; pip install 'autopar[ray]'") from None
    return ray


def needs(plan: Plan) -> dict[str, Counter[str]]:
    """Returns node name → how many devices of each kind the plan's stages use there.

    A Ray node offers its devices as a custom resource that is called as their kind.
    """
    found: dict[str, Counter[str]] = {}
    for stage in plan.stages:
        for node, _ in stage.devices:
            found.setdefault(node, Counter())[stage.mesh.device.name] += 1
    return found


class Nodes:
    """A session's share in the connection to a Ray cluster. Begun at once, there after `connect`."""

    def __init__(self, plan: Plan, address: str | None, emulate: bool):
        self.ray, self._needs = import_ray(), needs(plan)
        self._address, self._emulate, self._open = address, emulate, True
        self._group: Any = None
        _SHARED.users += 1
        try:
            if emulate and _SHARED.emulated is None and not self.ray.is_initialized():
                _SHARED.emulated = Emulated()
                _SHARED.emulated.ask(list(self._needs.values()))
        except BaseException:
            self.close()
            raise

    @property
    def emulated(self) -> bool:
        """Whether the workers are processes of this machine that nobody else looks after."""
        return self._emulate and _SHARED.emulated is not None

    def ready(self) -> bool:
        """Returns whether `connect` would not wait for nodes."""
        return _SHARED.emulated is None or _SHARED.emulated.ready()

    def connect(self) -> None:
        """Waits for the nodes. Raises BackendError when the cluster is not there or lacks devices."""
        address = self._address or "auto"
        try:
            if self._emulate and _SHARED.emulated is not None:
                address = _SHARED.emulated.address()
            if not self.ray.is_initialized():
                self._init(address)
            elif self._address not in (None, "auto", here := self.ray.get_runtime_context().gcs_address):
                raise BackendError(
                    f"{self._address} is not the Ray cluster that this process is connected to ({here}); it "
                    "can be connected to one only: call ray.shutdown() first"
                )
            elif self.emulated and _short(_total(self._needs), self.ray.cluster_resources()):
                self._extend()
        except (OSError, RuntimeError, ValueError) as error:
            raise BackendError(
                f"no Ray cluster at {address} ({_first_line(error)}); start one with `ray start --head` and "
                "pass its address, or try the plan on this machine with Ray(emulate=True)"
            ) from None
        self._check()

    def _init(self, address: str) -> None:
        emulated = _SHARED.emulated is not None
        host, _, port = address.rpartition(":")
        if host and port.isdecimal() and "://" not in host:
            socket.create_connection((host, int(port)), CONNECT).close()  # Ray itself tries for minutes
        own = {"_node_ip_address": LOOPBACK} if emulated else {}
        with _quiet(), _own_signals(), _loopback() if emulated else contextlib.nullcontext():
            self.ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
        _SHARED.connected = True
        _print_raylets(False)

    def reserve(self, plan: Plan, gpus: bool) -> list[Any]:
        """Returns where the worker of each stage is to be scheduled: all stages find devices, or none does.

        Workers that Ray places one by one can keep each other out: one that needs two devices may go where
        four are, and leave no node for the one that needs four.

        Args:
            gpus: whether devices are Ray's own GPUs too.

        Raises:
            BackendError: no devices are free within `START` seconds.
        """
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        wanted = [demand(stage.mesh, gpus) for stage in plan.stages]
        self._group = group = placement_group(wanted, strategy="PACK")
        if self.emulated and not group.wait(SETTLE):  # its nodes are other sessions'
            self._extend()
        if not group.wait(START):
            each = "; ".join(f"stage {s}: {_listed(one)}" for s, one in enumerate(wanted))
            offered = self.ray.available_resources()
            free = _listed({kind: offered.get(kind, 0) for one in wanted for kind in one})
            raise BackendError(
                f"no nodes had devices free for all stages within {START:g} s ({each}, each on one node); "
                f"are they taken by others? Free in all: {free}"
            )
        return [PlacementGroupSchedulingStrategy(group, s) for s in range(len(wanted))]

    def _extend(self) -> None:
        """Adds nodes to the emulated cluster. Raises BackendError: they could not start."""
        assert _SHARED.emulated is not None
        try:
            _SHARED.emulated.ask(list(self._needs.values()))
            _SHARED.emulated.address()
        except OSError as error:
            raise BackendError(
                f"the emulated Ray cluster could not be extended ({_first_line(error)}); close sessions that "
                "are not needed any more"
            ) from None

    def _check(self) -> None:
        offered = self.ray.cluster_resources()
        if short := _short(_total(self._needs), offered):
            lacking = ", ".join(
                f"{n} × {kind} (it has {offered.get(kind, 0):g})" for kind, n in short.items()
            )
            example = ", ".join(f'"{kind}": {n}' for kind, n in short.items())
            raise BackendError(
                f"the Ray cluster lacks {lacking}; a node offers its devices by "
                f"`ray start --address=… --resources='{{{example}}}'`"
            )

    def close(self) -> None:
        """Gives the share back; the last one disconnects and stops what was started here."""
        if not self._open:
            return
        self._open = False
        self._release()
        _SHARED.users -= 1
        if _SHARED.users:
            return
        with contextlib.suppress(Exception), _quiet(), _own_signals():
            if _SHARED.connected:
                self.ray.shutdown()
                _print_raylets(True)
        if _SHARED.emulated is not None:
            _SHARED.emulated.close()
        _SHARED.connected, _SHARED.emulated = False, None

    def _release(self) -> None:
        group, self._group = self._group, None
        if group is not None and self.ray.is_initialized():
            from ray.util.placement_group import remove_placement_group

            with contextlib.suppress(Exception):
                remove_placement_group(group)


def demand(mesh: Mesh, gpus: bool) -> dict[str, float]:
    """Returns the Ray resources that a stage's worker takes: its devices by their kind, and as GPUs."""
    devices = float(mesh.size)
    return {mesh.device.name: devices} | ({"GPU": devices} if gpus else {})


def _listed(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{n:g} × {kind}" for kind, n in resources.items())


def _total(nodes: Mapping[str, Counter[str]]) -> Counter[str]:
    return sum(nodes.values(), Counter[str]())


def _short(wanted: Mapping[str, int], offered: Mapping[str, float]) -> dict[str, int]:
    return {kind: n for kind, n in wanted.items() if offered.get(kind, 0) < n}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _print_raylets(wanted: bool) -> None:
    """Ray prints every worker's death on the driver's terminal, whatever `log_to_driver` says; an error of
    ours says it already."""
    from ray._private import worker

    if hasattr(worker, "_worker_logs_enabled"):
        worker._worker_logs_enabled = wanted


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """This process takes 127.0.0.1 as it is, as the emulated cluster's processes do (see `emulated`)."""
    from ray._private import ray_constants

    told = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = told


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """What this process does at SIGTERM stays as it is, if it connects or disconnects in a thread.

    Ray's C++ part takes the signal when it connects and forgets it when it disconnects, handlers of Python's
    included; so a server that has connected again after a worker was lost would die of it rather than drain.
    Python itself sets handlers in the main thread only.
    """
    if threading.current_thread() is threading.main_thread() or sys.platform == "win32":
        yield
        return
    libc, kept = ctypes.CDLL(None), ctypes.create_string_buffer(512)  # more than any struct sigaction
    libc.sigaction(signal.SIGTERM, None, kept)
    try:
        yield
    finally:
        libc.sigaction(signal.SIGTERM, kept, None)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray leaves sockets and files to the garbage collector, and uses what is deprecated."""
    with warnings.catch_warnings():
        for category in (ResourceWarning, DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)  # it execs at once
        yield
