"""`autopar bench planning`: seconds from a function to its plan, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from autopar import cluster as room
from autopar.api.methods import Auto, Method, ShardParallel
from autopar.api.parallelize import parallelize
from autopar.core.errors import UnknownName
from autopar.core.stopwatch import listen
from autopar.models import catalog
from autopar.models.step import ModelStep
from autopar.report.picture import PALETTE, figure_of
from autopar.report.units import seconds, share
from autopar.trace.gradient import value_and_grad

SECTIONS = ("trace", "graph", "build", "solve", "emit")
"""The function run on tracers; gradients and factor rules; the choice problem; its solution; the program."""

LAYERS = (12, 24, 48, 96)
"""Of the GPTs that show how time grows with depth."""

NETWORK = 25e9 / 8
"""Bytes/s between nodes."""


@dataclass(frozen=True)
class Case:
    """A step to plan, on nodes of some devices.

    Attributes:
        make: gives the step. nodes: device name of each node, and how many it has.
        limit: seconds that planning may take, None: it is only shown.
    """

    make: Callable[[], ModelStep]
    nodes: tuple[tuple[str, int], ...]
    method: Method
    limit: float | None = None

    @property
    def cluster(self) -> room.Cluster:
        """What is planned for."""
        found = (room.Node(f"n{i}", room.device(kind), n) for i, (kind, n) in enumerate(self.nodes))
        return room.Cluster(tuple(found), network=NETWORK)


def _train(name: str, batch: int, **sizes: Any) -> Callable[[], ModelStep]:
    dtype = None if name.startswith("wresnet") else "bfloat16"
    return lambda: catalog.get(name, batch=batch, dtype=dtype, value_and_grad=value_and_grad, **sizes)


A100, V100 = "A100-40GB", "V100-16GB"
CASES: dict[str, Case] = {
    "gpt-2.6b": Case(_train("gpt-2.6b", 8), ((A100, 4),) * 2, ShardParallel(mesh=(2, 4)), 3.0),
    "gpt-39b": Case(_train("gpt-39b", 64), ((A100, 8),) * 8, ShardParallel(mesh=(8, 8)), 10.0),
    "opt-175b decode": Case(lambda: catalog.get_decode("opt-175b"), ((A100, 8),) * 2, ShardParallel(), 10.0),
    "opt-175b prefill": Case(lambda: catalog.get("opt-175b"), ((A100, 8),) * 2, ShardParallel(), 10.0),
    "wresnet-101": Case(_train("wresnet-13b", 256), ((A100, 8),) * 8, ShardParallel(mesh=(8, 8)), 10.0),
}
"""One mesh each, no stages."""

STAGES = {"gpt-39b stages": Case(_train("gpt-39b", 1024), ((V100, 8),) * 8, Auto(), 60.0)}
"""Stages, micro-batches and shardings chosen."""


@dataclass(frozen=True)
class Row:
    """What planning took.

    Attributes:
        sections: seconds of each of `SECTIONS`. total: of all, and of what is in none of them.
        processor: seconds of all threads; less than the total where the machine was busy with other things.
        again: of the same call a second time. anew: for another `parallelize` of the same function.
        gap: how far from the optimum the plan may be. step: its predicted seconds.
    """

    name: str
    sections: tuple[float, ...]
    total: float
    processor: float
    again: float
    anew: float
    gap: float
    step: float


def measure(name: str, case: Case) -> Row:
    """Returns what planning a case takes. It must not have been planned in this process.

    Imports and the solver's kernels are not counted: a perceptron is planned first.
    """
    small = catalog.get("mlp", value_and_grad=value_and_grad)
    one = room.Cluster((room.Node("n", room.device(A100), 4),))
    parallelize(small.step, method=ShardParallel(), cluster=one).plan(*small.args)
    model, cluster = case.make(), case.cluster
    step = parallelize(model.step, method=case.method, cluster=cluster)
    with listen() as watch:
        begun, used = time.perf_counter(), time.process_time()
        plan = step.plan(*model.args)
        total, processor = time.perf_counter() - begun, time.process_time() - used
    begun = time.perf_counter()
    step.plan(*model.args)
    again = time.perf_counter() - begun
    begun = time.perf_counter()
    parallelize(model.step, method=case.method, cluster=cluster).plan(*model.args)
    anew = time.perf_counter() - begun
    sections = tuple(watch.seconds.get(section, 0.0) for section in SECTIONS)
    return Row(name, sections, total, processor, again, anew, plan.gap, plan.step_time)


def _named(name: str) -> Row:
    return measure(name, (CASES | STAGES)[name])


def _deep(layers: int) -> Row:
    case = Case(_train("gpt-2.6b", 8, layers=layers), (("A100-80GB", 8),) * 4, ShardParallel(mesh=(4, 8)))
    return measure(f"{layers} layers", case)


@click.command()
@click.argument("names", nargs=-1, metavar="[CASE]…")
@click.option("--stages", is_flag=True, help="also gpt-39b on 64 V100, stages and micro-batches chosen")
@click.option("--plot", metavar="FILE", help="draw how time grows with layers (.svg, .png, .pdf)")
def planning(names: Sequence[str], stages: bool, plot: str | None) -> None:
    """Plans each CASE (default: all) in a process of its own, and prints where the seconds went.

    With --plot, GPTs of 12 to 96 layers are planned as well.
    """
    for name in names:
        if name not in CASES | STAGES:
            raise UnknownName("case of the planning benchmark", name, CASES | STAGES)
    wanted = names or (*CASES, *(STAGES if stages else ()))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as fresh:
        grow_table((name, fresh.submit(_named, name)) for name in wanted)
        if plot:
            deep = grow_table((f"{layers} layers", fresh.submit(_deep, layers)) for layers in LAYERS)
            growth_picture(deep, plot)
            click.echo(f"growth with layers: {plot}")


def grow_table(runs: Iterable[tuple[str, Future[Row]]]) -> list[Row]:
    """Returns the rows of runs, each begun when the one before has ended; shows the table as it grows."""
    rows = list[Row]()
    console = Console(width=130)
    with Live(console=console, auto_refresh=False) as live:
        for name, run in runs:
            live.update(Group(table(rows), f"planning {name} …"), refresh=True)
            rows.append(run.result())
        live.update(table(rows), refresh=True)
    if not console.is_terminal:
        console.print()  # a live table ends its last line on terminals only
    return rows


def table(rows: Sequence[Row]) -> Table:
    """Returns one line per case: seconds by section, in all, and of a second plan."""
    shown = Table(show_edge=False, pad_edge=False)
    for name in ("case", *SECTIONS, "other", "total", "limit", "processor", "again", "anew", "gap", "step"):
        shown.add_column(name, justify="left" if name == "case" else "right")
    limits = {name: case.limit for name, case in (CASES | STAGES).items()}
    for row in rows:
        limit = limits.get(row.name)
        parts = (*row.sections, row.total - sum(row.sections), row.total)
        words = "" if limit is None else f"≤ {limit:g}" if row.total <= limit else f"over {limit:g}"
        later = (
            f"{row.processor:.2f}",
            f"{row.again:.3f}",
            f"{row.anew:.2f}",
            share(row.gap),
            seconds(row.step),
        )
        shown.add_row(row.name, *(f"{x:.2f}" for x in parts), words, *later)
    return shown


def growth_picture(rows: Sequence[Row], path: str) -> None:
    """Draws the seconds of each section over the number of layers, stacked, to `path`."""
    figure, (axes,) = figure_of(7, 4, [1])
    parts = [[row.sections[k] for row in rows] for k in range(len(SECTIONS))]
    other = [row.total - sum(row.sections) for row in rows]
    axes.stackplot(LAYERS, *parts, other, labels=[*SECTIONS, "other"], colors=PALETTE)
    axes.set(
        xlabel="layers", ylabel="seconds to plan", title="GPT, hidden 2560, on 4×8 A100-80GB", xticks=LAYERS
    )
    axes.legend(loc="upper left", fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
