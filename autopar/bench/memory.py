"""`autopar bench memory`: what tighter and tighter memory costs, and what is computed again for it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import autopar
from autopar import cluster as room
from autopar.api.methods import ShardParallel
from autopar.api.parallelize import Parallelized, parallelize
from autopar.bench.plan_cases import case, cluster_of
from autopar.bench.plan_cell import Bench
from autopar.cluster.units import bandwidth
from autopar.core.errors import BadInput, DoesNotFit
from autopar.core.graph import Remat
from autopar.report.picture import PALETTE, figure_of
from autopar_solver.json_form import write_whole

DEFAULT = ("gpt", "mlp", "wresnet")
PLENTY = 1 << 50
"""Bytes of a device whose memory does not matter."""

RESERVE = 0.08
"""Share of a limit that is left for what an allocator wastes: as much as the database leaves of a device."""


@dataclass(frozen=True)
class Row:
    """One plan.

    Attributes:
        model, mesh, device: by name. share: of the unlimited plan's predicted peak that may be used; None:
            unlimited. limit: the same in bytes.
        predicted, compiled: peak bytes per device, of the plan and of the compiled program.
        seconds: predicted, per step. gap: proven relative distance from the fastest plan within the limit.
        again: (layer, what it computes again).
        planning: processor seconds. error: why there is no plan, "" if there is one.
    """

    model: str
    mesh: str
    device: str
    share: float | None
    limit: int
    predicted: int = 0
    compiled: int = 0
    seconds: float = 0.0
    gap: float = 0.0
    again: tuple[tuple[str, str], ...] = ()
    planning: float = 0.0
    error: str = ""

    @property
    def cell(self) -> tuple[str, str, str]:
        return self.model, self.mesh, self.device


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]…")
@click.option("--mesh", "meshes", multiple=True, default=("1x8", "2x4"), show_default=True)
@click.option(
    "--share", "shares", multiple=True, type=float, default=(0.8, 0.6, 0.4, 0.25), show_default=True,
    help="of the unlimited plan's peak; repeatable",
)  # fmt: skip
@click.option("--device", default="V100-16GB", show_default=True, help="device kind, of the database")
@click.option("--network", default="25Gbps", show_default=True, help="of a node, between nodes")
@click.option(
    "--json", "json_path", metavar="FILE", help="keep every figure here; what is there is not redone"
)
@click.option("--picture", metavar="FILE", help="draw time over the limit (.svg, .png, .pdf)")
def memory(
    models: Sequence[str], meshes: Sequence[str], shares: Sequence[float], device: str, network: str,
    json_path: str | None, picture: str | None,
) -> None:  # fmt: skip
    """Plans each MODEL (default: gpt, mlp, wresnet) with less and less memory per device.

    First without a limit, then with shares of the peak which that plan has. Every plan is compiled for host
    devices, and the compiled program's peak memory stands beside the limit.
    """
    autopar.emulate(8)
    kept = _kept(json_path)
    every = (None, *sorted(shares))  # what fits a tight limit is known when a looser one is planned
    jobs = [(model, mesh, share) for model in models or DEFAULT for mesh in meshes for share in every]
    console = Console(width=150)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(jobs))
        for model, mesh, share in jobs:
            progress.update(task, description=f"{model} on {mesh}, {_share(share)}")
            key = (model, mesh, device, share)
            if key not in kept:
                free = kept.get((model, mesh, device, None))
                kept[key] = row(model, mesh, device, bandwidth(network), share, free)
                _keep(json_path, kept)
            progress.advance(task)
    found = [kept[model, mesh, device, share] for model, mesh, share in jobs]
    console.print(table(found))
    console.print(summary(found))
    if picture:
        draw(found, picture)


def row(model: str, mesh: str, device: str, network: float, share: float | None, free: Row | None) -> Row:
    """Returns the plan with a share of the memory that the unlimited one (`free`) has."""
    cluster, shape = cluster_of(mesh, room.device(device), network)
    if cluster.size > 8:
        raise BadInput(f"mesh {mesh} has {cluster.size} devices; this benchmark compiles for 8 at most")
    limit = PLENTY if share is None or free is None else int(share * free.predicted)
    found = Row(model, mesh, device, share, limit)
    step, args = _step(model, _limited(cluster, int((1 - RESERVE) * limit)), shape)
    start = time.process_time()
    try:
        plan = step.plan(*args)
    except DoesNotFit as error:
        return replace(found, planning=time.process_time() - start, error=str(error))
    planning = time.process_time() - start
    sharding = plan.stages[0].sharding
    bench = Bench(case(model, cluster.size), sharding.mesh, step.trace(*args))
    return replace(
        found,
        predicted=sharding.memory.peak,
        compiled=bench.compiled(model, "", sharding, planning).score.peak,
        seconds=plan.step_time,
        gap=plan.gap,
        again=tuple((name, str(remat)) for name, remat in plan.remat),
        planning=planning,
    )


def _step(model: str, cluster: room.Cluster, shape: tuple[int, ...]) -> tuple[Parallelized, tuple[Any, ...]]:
    of = case(model, cluster.size).step
    return parallelize(of.step, cluster=cluster, method=ShardParallel(mesh=shape)), of.args


def _limited(cluster: room.Cluster, limit: int) -> room.Cluster:
    nodes = tuple(replace(node, device=replace(node.device, memory=limit)) for node in cluster.nodes)
    return replace(cluster, nodes=nodes)


# -- what is shown


def table(rows: Sequence[Row]) -> Table:
    """Returns a line per plan."""
    shown = Table("model", "mesh", "limit", show_edge=False, pad_edge=False)
    for column in ("MB limit", "MB predicted", "MB compiled", "ms", "× unlimited", "gap", "plan CPU s"):
        shown.add_column(column, justify="right")
    shown.add_column("computed again")
    for r in rows:
        free = next(x for x in rows if x.cell == r.cell and x.share is None)
        limit = "" if r.share is None else f"{r.limit / 1e6:.1f}"
        if r.error:
            shown.add_row(
                r.model, r.mesh, _share(r.share), limit, *["–"] * 5, f"{r.planning:.1f}", _first(r.error)
            )
            continue
        figures = (r.predicted / 1e6, r.compiled / 1e6)
        over = " over!" if r.share is not None and r.compiled > r.limit else ""
        cells = (f"{figures[0]:.1f}", f"{figures[1]:.1f}{over}", f"{1e3 * r.seconds:.3f}")
        again = ", ".join(f"{name} {WORDS[what]}" for name, what in r.again)
        ratio = f"{r.seconds / free.seconds:.2f}"
        times = ratio, f"{r.gap:.1%}", f"{r.planning:.1f}"
        shown.add_row(r.model, r.mesh, _share(r.share), limit, *cells, *times, again)
    return shown


WORDS = {
    Remat.PRODUCTS.value: "(all but products)",
    Remat.PARTS.value: "(part by part)",
    Remat.FULL.value: "(everything)",
}


def summary(rows: Sequence[Row]) -> str:
    """Returns how many limits are kept, by the compiled program too."""
    limited = [r for r in rows if r.share is not None]
    fits = [r for r in limited if not r.error]
    over = [r for r in fits if r.compiled > r.limit]
    return (
        f"{len(limited)} limits: {len(fits)} plans fit, {len(limited) - len(fits)} do not; "
        f"the compiled program stays within the limit in {len(fits) - len(over)} of {len(fits)}"
    )


def _share(share: float | None) -> str:
    return "unlimited" if share is None else f"{share:.0%}"


def _first(error: str) -> str:
    return error.split(". ")[0][:160]


def draw(rows: Sequence[Row], path: str) -> None:
    """Draws the predicted time over the limit, both in units of the unlimited plan's."""
    figure, (axes,) = figure_of(7, 4, [1])
    for i, cell in enumerate(dict.fromkeys(r.cell for r in rows)):
        own = [r for r in rows if r.cell == cell]
        free = next(r for r in own if r.share is None)
        fits = sorted((r.share or 1.0, r.seconds / free.seconds) for r in own if not r.error)
        colour = PALETTE[i % len(PALETTE)]
        axes.plot(*zip(*fits), "o-", color=colour, label=f"{cell[0]} on {cell[1]}", lw=1.5, ms=4)
        fails = [r.share or 1.0 for r in own if r.error]
        axes.plot(fails, [1.0] * len(fails), "x", color=colour, ms=7)
    axes.set(xlabel="limit / peak of the unlimited plan (×: nothing fits)", ylabel="time / unlimited plan's")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


# -- what is kept

Key = tuple[str, str, str, float | None]


def _kept(path: str | None) -> dict[Key, Row]:
    if path is None or not Path(path).exists():
        return {}
    try:
        rows = [Row(**data) for data in json.loads(Path(path).read_text())]
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} doesn't hold figures of this benchmark ({error}); delete it") from None
    return {(r.model, r.mesh, r.device, r.share): r for r in rows}


def _keep(path: str | None, kept: dict[Key, Row]) -> None:
    if path is not None:
        write_whole(path, json.dumps([asdict(r) for r in kept.values()], indent=1).encode())
