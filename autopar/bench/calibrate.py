"""A device kind measured on this machine: matrix products, memory traffic, collectives and launches."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from autopar import cluster as room
from autopar.cluster.emulate import emulate
from autopar.core.codec import to_data
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

    FLOP/s of a square product in each type (1024³ on a CPU, 8192³ on a GPU), bytes/s of adding two big
    arrays, α and β of an all-reduce over all devices (ring: 2(n−1)/n of the bytes on the wire) fitted to a
    small and a large one. What one device alone cannot tell (its links) is the database's.
    """
    cpu = devices[0].platform == "cpu"
    side, length = (1024, 8 << 20) if cpu else (8192, 64 << 20)
    launch = _on_all(devices, lambda x: x + 1, (8,)) / len(devices)
    flops = tuple(
        (dtype, 2 * side**3 / _on_all(devices, lambda x: x @ x, (side, side), dtype, launch))
        for dtype in (("float32",) if cpu else ("bfloat16", "float16", "float32"))
    )
    bandwidth = 3 * 4 * length / _on_all(devices, lambda x: x + 1.5 * x[::-1], (length,), "float32", launch)
    known = room.match(devices[0].device_kind)
    base = room.device(known or "CPU")
    link, latency = _all_reduce(devices, base)
    memory = (devices[0].memory_stats() or {}).get("bytes_limit", base.memory)
    found = replace(base, name=name, memory=memory, bandwidth=bandwidth, flops=flops, link=link)
    return replace(found, link_latency=latency), launch


def _on_all(
    devices: Sequence[Any],
    fun: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: str = "float32",
    launch: float = 0.0,
) -> float:
    """Seconds until every device has run `fun` once, all at the same time, without launching it."""
    jitted = jax.jit(fun)
    arrays = [jax.device_put(jnp.ones(shape, dtype), d) for d in devices]
    return max(1e-9, seconds_of(lambda: [jitted(x) for x in arrays]) - launch * len(devices))


def _all_reduce(devices: Sequence[Any], base: Device) -> tuple[float, float]:
    """(bytes/s, seconds) of the link between devices; the database's where there is only one."""
    n = len(devices)
    if n == 1:
        return base.link, base.link_latency
    mesh = Mesh(np.array(devices), ("x",), axis_types=(AxisType.Auto,))
    shard, whole = (NamedSharding(mesh, PartitionSpec(*p)) for p in (("x",), ()))
    add = jax.jit(lambda x: x.sum(0), in_shardings=shard, out_shardings=whole)
    small, large = 64, 1 << 20
    times = [seconds_of(partial(add, jax.device_put(jnp.ones((n, k)), shard))) for k in (small, large)]
    wire = [2 * (n - 1) / n * 4 * k for k in (small, large)]
    bandwidth = (wire[1] - wire[0]) / max(times[1] - times[0], 1e-9)
    return bandwidth, max(1e-6, (times[0] - wire[0] / bandwidth) / 2)


def save(device: Device, path: str) -> None:
    """Writes a device as JSON; cluster files and short forms take its path for a device's name."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(to_data(device), file, indent=1)


@click.command("calibrate")
@click.option("--devices", type=click.IntRange(min=1), help="how many to use; the default is all there are")
@click.option("--host", is_flag=True, help="host devices that stand in for accelerators (with --devices)")
@click.option("--name", default="measured", show_default=True, help="what to call the device")
@click.option("--out", default="measured.json", show_default=True, metavar="FILE", help="where to write it")
def calibrate_command(devices: int | None, host: bool, name: str, out: str) -> None:
    """Measures this machine's device kind and writes it as JSON, in a minute.

    A cluster file says `device: measured.json`, a short form `8xmeasured.json`.
    """
    if host:
        emulate(devices or 1)
    found, launch = calibrate(jax.devices()[:devices], name)
    save(found, out)
    rates = ", ".join(f"{dtype} {rate / 1e12:.3g} TFLOP/s" for dtype, rate in found.flops)
    click.echo(
        f"{out}: {found.name} ({jax.devices()[0].device_kind}), {rates}, "
        f"memory {found.bandwidth / 1e9:.4g} GB/s, links {found.link / 1e9:.3g} GB/s + "
        f"{found.link_latency * 1e6:.3g} µs, launch {launch * 1e6:.3g} µs"
    )
