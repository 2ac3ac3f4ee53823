"""A Ray cluster made up on this machine, in a process of its own.

The process is this file, run as a script: it imports neither JAX nor autopar, it shares neither Ray's signal
handlers nor its forks with the user's program, and it starts nodes while that program does something else. It
takes one JSON list of nodes' resources per line, answers each with the cluster's address, and stops
everything when its input ends, as it does when the user's program dies.

Nothing listens beyond 127.0.0.1. Ray takes that address for "an address of this machine" and listens on the
one that others can reach, unless it runs where it knows of no clusters (macOS, Windows); a variable tells it
so here.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

LOOPBACK = "127.0.0.1"
STORE = 100 << 20
"""Bytes of each node's object store."""

PATIENCE = 120.0
"""Seconds in which nodes have started."""

_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill workers for what other programs here take
}


class Emulated:
    """The process and its cluster, as seen by the program that uses it. Raises OSError if it cannot start."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in close)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=os.environ | _ENVIRONMENT,
            start_new_session=True,  # an interrupt from the keyboard is ours, the cluster stops after us
        )
        self._asked, self._answers = 0, b""
        self._address = ""

    def ask(self, nodes: Sequence[Mapping[str, int]]) -> None:
        """Asks for nodes with these resources, and does not wait for them."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `address` says why
            self._process.stdin.write(json.dumps(list(nodes)).encode() + b"\n")
            self._process.stdin.flush()
        self._asked += 1

    def ready(self) -> bool:
        """Returns whether all nodes asked for are there, or never will be."""
        return self._hear(0.0)

    def address(self) -> str:
        """Returns the cluster's address, once all nodes are there. Raises OSError if they could not start."""
        if not self._hear(PATIENCE):
            raise OSError(f"its nodes did not start within {PATIENCE:g} s")
        if self._asked:
            self._errors.seek(0)
            said = self._errors.read().decode(errors="replace").strip().splitlines()
            raise OSError(f"its process ended: {said[-1][:300] if said else 'it left no message'}")
        return self._address

    def _hear(self, seconds: float) -> bool:
        assert self._process.stdout is not None
        end = time.monotonic() + seconds
        while self._asked:
            left = max(0.0, end - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                return False
            data = os.read(self._process.stdout.fileno(), 4096)
            if not data:
                return True
            *lines, self._answers = (self._answers + data).split(b"\n")
            for line in lines:
                self._asked, self._address = self._asked - 1, line.decode()
        return True

    def close(self) -> None:
        """Stops the cluster."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()  # its nodes die with it
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever Ray prints is not an answer
    from ray.cluster_utils import Cluster

    here: dict[str, Any] = {"node_ip_address": LOOPBACK, "object_store_memory": STORE, "num_cpus": 1}
    head = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    cluster: Any = None
    try:
        for line in sys.stdin:
            for resources in json.loads(line):
                if cluster is None:
                    first = {**here, **head, "resources": resources}
                    cluster = Cluster(initialize_head=True, head_node_args=first)
                else:
                    cluster.add_node(wait=False, resources=resources, **here)
            cluster.wait_for_nodes(PATIENCE)
            print(cluster.address, file=answers, flush=True)
    finally:
        if cluster is not None:
            cluster.shutdown()


if __name__ == "__main__":
    _serve()
