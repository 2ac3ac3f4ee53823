"""`autopar bench simulation`: the predicted step beside the measured one, on this machine's own devices."""

from __future__ import annotations

import os
import platform
import statistics
import time
from dataclasses import replace
from typing import Any

import click
import jax
from rich.console import Console
from rich.table import Table

import autopar
from autopar import cluster as room
from autopar.api.parallelize import parallelize
from autopar.api.plan import Plan
from autopar.bench.calibrate import calibrate
from autopar.models import catalog
from autopar.program import simulate
from autopar.program.simulate import planned
from autopar.trace.gradient import value_and_grad


@click.command()
@click.option("--model", default="gpt-tiny", show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--devices", default=4, show_default=True, help="host devices to use")
@click.option("--stages", default="1,2", show_default=True, help="numbers of stages to try")
@click.option("--micro-batches", default=2, show_default=True)
@click.option("--steps", default=20, show_default=True)
def simulation(model: str, batch: int, devices: int, stages: str, micro_batches: int, steps: int) -> None:
    """Calibrates the cost model here, plans, simulates, runs in this process, and prints both step times."""
    autopar.emulate(devices)
    device, launch = calibrate(jax.devices()[:devices])
    cluster = room.Cluster((room.Node("here", device, devices),))
    console = Console()
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}: {devices} busy devices, each "
        f"{dict(device.flops)['float32'] / 1e9:.1f} GFLOP/s, {device.bandwidth / 1e9:.1f} GB/s, links "
        f"{device.link / 1e9:.2f} GB/s + {1e6 * device.link_latency:.0f} µs, launch {1e6 * launch:.0f} µs"
    )
    step = catalog.get(model, batch=batch, value_and_grad=value_and_grad)
    table = Table("stages", "simulated ms", "measured ms", "simulated / measured")
    for count in map(int, stages.split(",")):
        found = _case(step, cluster, count, micro_batches, launch, steps)
        table.add_row(str(count), *(f"{1e3 * t:.1f}" for t in found), f"{found[0] / found[1]:.2f}")
    console.print(table)


def _case(
    model: Any, cluster: room.Cluster, stages: int, micro: int, launch: float, steps: int
) -> tuple[float, float]:
    """(simulated, measured) seconds per step."""
    step = parallelize(model.step, cluster=cluster, method=autopar.Auto(stages=stages, micro_batches=micro))
    state, batch = model.init(jax.random.key(0)), model.make_batch(jax.random.key(1))
    plan = step.plan(state, batch)
    program = Plan.of(plan).program()
    predicted = simulate(plan, program, replace(planned(plan, program), launch=launch)).step_time
    times: list[float] = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        state, loss = step(state, batch)
        jax.block_until_ready((state, loss))
        times.append(time.perf_counter() - start)
    step.close()
    return predicted, statistics.median(times[2:])
