"""`autopar bench plans`: the automatic sharding beside every plan that a person would write."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click
from rich.console import Console
from rich.table import Table

import autopar
from autopar.bench.plan_cases import CASES, case, mesh_of
from autopar.bench.plan_cell import Cell, Row, cell
from autopar.bench.score import geometric_mean
from autopar.cluster.units import bandwidth
from autopar.core.errors import PlanError


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]…")
@click.option(
    "--mesh", "meshes", multiple=True, default=("1x8", "2x4"), show_default=True, help="e.g. 2x4; repeatable"
)
@click.option("--device", default="V100-16GB", show_default=True, help="device kind, of the database")
@click.option("--network", default="25Gbps", show_default=True, help="of a node, between nodes")
@click.option("--steps", default=0, show_default=True, help="steps to time on host devices (0: none)")
@click.option("--json", "json_path", metavar="FILE", help="write every figure as JSON")
def plans(
    models: Sequence[str], meshes: Sequence[str], device: str, network: str, steps: int, json_path: str | None
) -> None:
    """Compares the automatic plan of each MODEL (default: all) with experts' on each mesh.

    All plans are compiled, and judged by one measure taken from the compiled program: seconds of its
    collectives by an α–β model over their replica groups, plus a roofline of its kernels.
    """
    speed = bandwidth(network)
    shapes = [(text, mesh_of(text, device, speed)) for text in meshes]
    autopar.emulate(max(mesh.size for _, mesh in shapes))
    console, found = Console(width=150), list[Cell]()
    for name in models or tuple(CASES):
        for text, mesh in shapes:
            try:
                with console.status("") as status:
                    found.append(cell(case(name, mesh.size), mesh, text, steps, status.update))
            except PlanError as error:
                console.print(f"{name} on {text}: {error}")
                continue
            console.print(table(found[-1], mesh.names))
            for expert, why in found[-1].failed:
                console.print(f"  {expert}: not judged: {why}")
    console.print(summary(found))
    if json_path:
        with open(json_path, "w", encoding="utf-8") as file:
            json.dump([data(c) for c in found], file, indent=1)


def table(c: Cell, axes: Sequence[str]) -> Table:
    """Returns all plans of a cell, the automatic one first, then by the measure."""
    title = f"{c.model} on {c.mesh}: automatic / best expert = {c.ratio:.3f}"
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
    mean = geometric_mean([c.ratio for c in cells])
    over = sum(c.ratio > 1 for c in cells)
    title = f"{len(cells)} cells, {over} above 1.00, geometric mean {mean:.3f}"
    shown = Table("model", "mesh", title=title, title_justify="left", show_edge=False, pad_edge=False)
    for column in ("automatic ms", "best ms", "ratio", "bytes off", "memory off"):
        shown.add_column(column, justify="right")
    shown.add_column("best expert")
    for c in sorted(cells, key=lambda c: -c.ratio):
        best = f"{c.best.name}, {c.best.variant}"
        times = (1e3 * row.score.seconds for row in (c.automatic, c.best))
        shown.add_row(
            c.model, c.mesh, *(f"{t:.3f}" for t in times), f"{c.ratio:.3f}", *map(_percent, errors(c)), best
        )
    return shown


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
