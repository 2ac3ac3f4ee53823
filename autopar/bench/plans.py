"""`autopar bench plans`: the automatic sharding beside every plan that a person would write."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from autopar.bench.plan_cases import CASES, case, mesh_of
from autopar.bench.plan_cell import Cell, Row
from autopar.bench.plan_jobs import Done, Job, Kept, run
from autopar.bench.score import geometric_mean
from autopar.cluster.units import bandwidth

MESHES = ("1x8", "2x4", "8x8", "2x2x2", "1x6")
DEVICES = ("V100-16GB", "A100-40GB")


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]…")
@click.option(
    "--mesh", "meshes", multiple=True, default=MESHES, show_default=True, help="e.g. 2x4; repeatable"
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    default=DEVICES,
    show_default=True,
    help="of the database; repeatable",
)
@click.option("--network", default="25Gbps", show_default=True, help="of a node, between nodes")
@click.option("--steps", default=0, show_default=True, help="steps to time on host devices (0: none)")
@click.option(
    "--near",
    type=click.FloatRange(0),
    help="compile only experts predicted within this factor of the best of them (0: none; default: all)",
)
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="cells at once")
@click.option(
    "--keep",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON file of judged cells: they are not judged again, and the table can be made in several calls",
)
@click.option("--json", "json_path", metavar="FILE", help="write every figure as JSON")
def plans(
    models: Sequence[str],
    meshes: Sequence[str],
    devices: Sequence[str],
    network: str,
    steps: int,
    near: float | None,
    jobs: int,
    keep: Path | None,
    json_path: str | None,
) -> None:
    """Compares the automatic plan of each MODEL (default: all) with experts' on each mesh of each device.

    All plans are compiled, and judged by one measure taken from the compiled program: seconds of its
    collectives by an α–β model over their replica groups, plus a roofline of its kernels.
    """
    speed, chosen = bandwidth(network), models or tuple(CASES)
    asked = [Job(m, mesh, d, speed, steps, near) for d in devices for mesh in meshes for m in chosen]
    for job in asked:  # names and meshes are looked at before hours are spent
        size = mesh_of(job.mesh, job.device, speed).size
        if job.model not in CASES:
            case(job.model, size)
    console = Console(width=150)
    found = judged(asked, Kept(keep), jobs, console)
    console.print(summary(found))
    if json_path:
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump([data(c) for c in found], file, indent=1)


def judged(asked: Sequence[Job], kept: Kept, at_once: int, console: Console) -> list[Cell]:
    """Returns the cells, each printed as soon as it is judged, under a bar that says what runs."""
    found: list[Cell] = []
    bar = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*bar, console=console) as progress:
        task, running = progress.add_task("", total=len(asked)), list[Job]()

        def show() -> None:
            progress.update(task, description=", ".join(map(str, running)), refresh=True)

        def start(job: Job) -> None:
            running.append(job)
            show()

        for done in run(asked, kept, at_once, start):
            if done.job in running:
                running.remove(done.job)
                report(done, progress.console)
            found += [] if done.cell is None else [done.cell]
            progress.advance(task)
            show()
    return found


def report(done: Done, console: Console) -> None:
    """Prints what became of a job."""
    if done.cell is None:
        console.print(f"{done.job}: {done.error}", markup=False)
        return
    console.print(table(done.cell, list(done.cell.automatic.wire or done.cell.automatic.score.wire)))
    for expert, why in done.cell.failed:
        console.print(f"  {expert}: not judged: {why}", markup=False)


def table(c: Cell, axes: Sequence[str]) -> Table:
    """Returns all plans of a cell, the automatic one first, then by the measure."""
    title = f"{c.model} on {c.mesh} {c.device}: automatic / best expert = {c.ratio:.3f}"
    shown = Table("plan", "", title=title, title_justify="left", show_edge=False, pad_edge=False)
    for axis in axes:
        shown.add_column(f"MB on {axis}", justify="right")
    for column in ("GFLOP", "MB peak", "comm ms", "comp ms", "total ms", "plan s", "step ms"):
        shown.add_column(column, justify="right")
    for row in (c.automatic, *sorted(c.experts, key=lambda row: row.score.seconds)):
        shown.add_row(row.name, row.variant, *_figures(row, axes))
    return shown


def _figures(row: Row, axes: Sequence[str]) -> list[str]:
    """Predicted figures stand in brackets behind the compiled program's."""

    def both(compiled: float, predicted: float | None) -> str:
        return f"{compiled:.2f}" + ("" if predicted is None else f" ({predicted:.2f})")

    s = row.score
    wire = [
        both(s.wire.get(a, 0.0) / 1e6, None if row.wire is None else row.wire.get(a, 0.0) / 1e6) for a in axes
    ]
    peak = both(s.peak / 1e6, None if row.peak is None else row.peak / 1e6)
    total = both(1e3 * s.seconds, None if row.seconds is None else 1e3 * row.seconds)
    times = [f"{1e3 * s.communication:.2f}", f"{1e3 * s.computation:.2f}", total]
    step = "" if row.step is None else f"{1e3 * row.step:.0f}"
    return [*wire, f"{s.flops / 1e9:.2f}", peak, *times, f"{row.planning:.1f}" if row.planning else "", step]


def summary(cells: Sequence[Cell]) -> Table:
    """Returns one line per cell, the worst ratio first, and how far predictions are off."""
    shown = Table("model", "mesh", "device", title=verdict(cells), title_justify="left", show_edge=False)
    for column in ("automatic ms", "best ms", "ratio", "bytes off", "memory off"):
        shown.add_column(column, justify="right")
    shown.add_column("best expert")
    for c in sorted(cells, key=lambda c: -c.ratio):
        best = f"{c.best.name}, {c.best.variant}" if c.experts else "none judged"
        times = (1e3 * row.score.seconds for row in (c.automatic, c.best))
        off = map(_percent, errors(c))
        shown.add_row(c.model, c.mesh, c.device, *(f"{t:.3f}" for t in times), f"{c.ratio:.3f}", *off, best)
    return shown


def verdict(cells: Sequence[Cell]) -> str:
    """Returns what is to be shown of all cells, in one line."""
    compared = [c.ratio for c in cells if c.experts]
    off = [errors(c) for c in cells]
    return (
        f"{len(cells)} cells, {sum(r > 1 for r in compared)} of {len(compared)} compared above 1.00, "
        f"geometric mean {geometric_mean(compared):.3f}; bytes within 1 % in "
        f"{sum(abs(wire) <= 0.01 for wire, _ in off)}, memory within 10 % in "
        f"{sum(abs(memory) <= 0.1 for _, memory in off)}"
    )


def errors(c: Cell) -> tuple[float, float]:
    """Returns how far the automatic plan's collective bytes and peak memory are from the compiled program's.

    predicted / compiled − 1; bytes are compared over all axes together.
    """
    row = c.automatic
    said, sent = sum((row.wire or {}).values()), row.score.sent
    wire = said / sent - 1 if sent else math.inf if said else 0.0
    return wire, (row.peak or 0) / row.score.peak - 1


def _percent(x: float) -> str:
    return f"{x:+.1%}"


def data(c: Cell) -> dict[str, Any]:
    """Returns a cell as plain data."""
    wire, memory = errors(c)
    return asdict(c) | {"ratio": c.ratio, "best": c.best.name, "bytes_off": wire, "memory_off": memory}
