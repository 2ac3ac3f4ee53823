"""`autopar bench load-memory`: the most memory any process has while weights come to their stages."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from autopar.api.cluster import Cluster
from autopar.api.inference import Latency, Wanted
from autopar.api.serving import Programs, Served, Shape, derived, same_state
from autopar.core.program import Worker
from autopar.io.huggingface import open_random
from autopar.report.units import size
from autopar.runtime.ray_backend import Ray
from autopar.serve.plan import decode_plan

ALLOWED = 1e9
"""Bytes that a process may have beside its own slice."""


@dataclass(frozen=True)
class Row:
    """One process: bytes of its own slice, resident before the weights came, and the most there were."""

    name: str
    slice: int
    before: int
    most: int

    @property
    def beside(self) -> int:
        """What it had at most beside its slice."""
        return self.most - self.slice


@click.command()
@click.option("--model", default="opt-1.3b", show_default=True, help="a known model, with random weights")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "float16"]))
@click.option("--cluster", "-c", default="1xA100-40GB,1xV100-16GB,1xT4", show_default=True)
@click.option("--stages", default=3, show_default=True, type=click.IntRange(min=1))
def load_memory(model: str, dtype: str, cluster: str, stages: int) -> None:
    """Spreads a model over stages in processes of their own, emulated here, and prints each one's memory."""
    began = time.monotonic()
    rows = measure(model, dtype, cluster, stages, lambda words: click.echo(words, err=True))
    table = Table(show_edge=False, pad_edge=False)
    for name in ("process", "own slice", "before", "most", "most − slice", ""):
        table.add_column(name, justify="left" if name in ("process", "") else "right")
    for row in rows:
        words = "ok" if row.beside <= ALLOWED else "more than 1 GB beside its slice"
        table.add_row(row.name, *map(size, (row.slice, row.before, row.most, row.beside)), words)
    Console(width=110).print(table)
    click.echo(
        f"{model} in {dtype}, {size(sum(row.slice for row in rows))} in all, {time.monotonic() - began:.0f} s"
    )


def measure(model: str, dtype: str, cluster_text: str, stages: int, say=lambda words: None) -> list[Row]:
    """Returns a row for this process and for that of each stage."""
    checkpoint, cluster = open_random(model, dtype=dtype), Cluster.parse(cluster_text)
    served = Served(checkpoint.module.DECODER, checkpoint.config, 2, 16, np.dtype(dtype))  # type: ignore[arg-type]
    length = min(256, checkpoint.config.positions)
    wanted = Wanted(Latency(), length // 16 + 1, stages)
    served, made = decode_plan(served, cluster, name=model, wanted=wanted, length=length, say=say)
    traced = served.tracer(Shape(1, 1, 1))(1, False)
    base = derived(made, traced, same_state(made.traced, traced), cluster)
    programs = Programs(served, base, cluster, Ray(emulate=True), say)
    try:
        session = programs.base.session
        before = session.resident()  # type: ignore[attr-defined]
        here = _most()
        programs.place(checkpoint.weights)
        most = session.most_resident()  # type: ignore[attr-defined]
        slices = [_bytes(worker) for worker in programs.base.program]
        names = [f"stage {s}: {x.stop - x.start} layers on {x.mesh}" for s, x in enumerate(base.plan.stages)]
        rows = [Row(*cells) for cells in zip(names, slices, before, most, strict=True)]
        return [Row("driver", 0, here, _most()), *rows]
    finally:
        programs.close()


def _bytes(worker: Worker) -> int:
    """Bytes of a worker's parameters and cache, all its devices together (each has its own memory)."""
    kept = {buffer.value for buffer in worker.state}
    return sum(slot.nbytes for slot in worker.slots if slot.value in kept)


def _most() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
