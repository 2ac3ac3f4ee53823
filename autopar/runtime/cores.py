"""Which cores XLA's threads run on, on host devices.

A step is hundreds of short products, between which the threads of XLA's pool sleep; where a thread wakes is
the operating system's choice each time. After a pause, or after others have used the machine, it may leave
several on one core for seconds while another is idle. With a core to each that cannot happen.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

POOL = "tf_XLAEigen"
"""What the threads are called that host devices compute with."""


def spread() -> dict[int, int]:
    """Returns thread → core, after giving each thread of XLA's pool one of this process's cores for its own.

    Nothing where there are more threads than cores, as with many host devices, where the devices are not of
    this process, and where the system is not Linux.
    """
    if not hasattr(os, "sched_setaffinity"):
        return {}
    cores, threads = sorted(os.sched_getaffinity(0)), _pool()
    if not 1 < len(threads) <= len(cores):
        return {}
    places = dict(zip(threads, cores))
    for thread, core in places.items():
        os.sched_setaffinity(thread, {core})
    return places


def _pool() -> list[int]:
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended
            if (task / "comm").read_text().strip() == POOL:
                found.append(int(task.name))
    return sorted(found)
