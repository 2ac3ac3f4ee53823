"""Threads of XLA's pool get a core each."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from autopar.runtime import cores

PROGRAM = """
import os, jax
from autopar.runtime.cores import spread
all = os.sched_getaffinity(0)
jax.devices()
for _ in range(2):  # a second model in the process changes nothing
    places = spread()
    print(len(places), sorted(places.values()) == sorted(all))
    assert all == os.sched_getaffinity(0)  # this thread goes where it likes
    assert {t: os.sched_getaffinity(t) for t in places} == {t: {core} for t, core in places.items()}
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads have no cores of their own here")
@pytest.mark.parametrize("devices", [1, 64])
def test_each_thread_of_the_pool_has_its_core(devices: int):
    count = len(os.sched_getaffinity(0))
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    wanted = f"{count} True" if count >= max(2, devices) else "0 False"
    assert done.stdout.splitlines() == [wanted] * 2


def test_elsewhere_nothing_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert cores.spread() == {}
