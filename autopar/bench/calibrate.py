"""A device kind measured on this machine: matrix products, memory traffic, collectives and launches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from autopar import cluster as room
from autopar.core.mesh import Device

ROUNDS = 7


def seconds_of(run: Callable[[], Any], rounds: int = ROUNDS) -> float:
    """Returns the median seconds of a call, results awaited, after one that warms up."""
    jax.block_until_ready(run())
    times: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def calibrate(devices: Sequence[Any], name: str = "measured") -> tuple[Device, float]:
    """Returns the device as it is when all of `devices` work at once, and the seconds of one launch.

    FLOP/s of a 1024³ float32 product, bytes/s of adding two 32 MB arrays, α and β of an all-reduce over all
    devices (ring: 2(n−1)/n of the bytes on the wire) fitted to a small and a large one.
    """
    side, length = 1024, 8 << 20
    flops = 2 * side**3 / _on_all(devices, lambda x: x @ x, (side, side))
    bandwidth = 3 * 4 * length / _on_all(devices, lambda x: x + 1.5 * x[::-1], (length,))
    launch = _on_all(devices, lambda x: x + 1, (8,)) / len(devices)
    link, latency = _all_reduce(devices)
    base = room.device("CPU")
    found = replace(base, name=name, bandwidth=bandwidth, flops=(("float32", flops),), link=link)
    return replace(found, link_latency=latency), launch


def _on_all(devices: Sequence[Any], fun: Callable[..., Any], shape: tuple[int, ...]) -> float:
    """Seconds until every device has run `fun` once, all at the same time."""
    jitted = jax.jit(fun)
    arrays = [jax.device_put(jnp.ones(shape, jnp.float32), d) for d in devices]
    return seconds_of(lambda: [jitted(x) for x in arrays])


def _all_reduce(devices: Sequence[Any]) -> tuple[float, float]:
    """(bytes/s, seconds) of the link between devices."""
    n = len(devices)
    if n == 1:
        only = room.device("CPU")
        return only.link, only.link_latency
    mesh = Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))
    shard, whole = (NamedSharding(mesh, PartitionSpec(*p)) for p in (("x",), ()))
    add = jax.jit(lambda x: x.sum(0), in_shardings=shard, out_shardings=whole)
    small, large = 64, 1 << 20
    times = [seconds_of(partial(add, jax.device_put(jnp.ones((n, k)), shard))) for k in (small, large)]
    wire = [2 * (n - 1) / n * 4 * k for k in (small, large)]
    bandwidth = (wire[1] - wire[0]) / max(times[1] - times[0], 1e-9)
    return bandwidth, max(1e-6, (times[0] - wire[0] / bandwidth) / 2)
