"""The stage program's benchmark: growth over three sizes, and other objectives at the largest."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from autopar_solver.stage_dp import Latency, Objective, Throughput, TrainStep, solve_stages
from autopar_solver.stage_dp_instances import KINDS, Transformer, transformer_problem

TRAIN = TrainStep()


@dataclass(frozen=True)
class Case:
    """A row of the benchmark: `devices` are shared 1 : 1 : 3 : 3 among two kinds of A100 and two of V100."""

    layers: int
    devices: int
    microbatches: int = 64
    noise: float = 0.1
    objective: Objective = TRAIN
    hidden: int = 12288

    @property
    def available(self) -> tuple[int, ...]:
        """Devices per kind."""
        unit = self.devices // 8
        return (unit, unit, 3 * unit, 3 * unit)


@dataclass(frozen=True)
class Row:
    """What a case took: wall and processor seconds, peak bytes of the process; how good the answer is."""

    case: Case
    choices: int
    stages: int
    seconds: float
    processor: float
    objective: float
    bound: float
    gap: float
    status: str
    peak: int


GROWTH = (Case(24, 128), Case(48, 256), Case(96, 512))
MORE = (
    Case(96, 512, noise=0.0),
    Case(96, 512, microbatches=8),
    Case(96, 512, microbatches=512),
    Case(96, 512, objective=Latency()),
    Case(96, 512, objective=Throughput()),
)


def measure(case: Case, seconds: float) -> Row:
    """The row of one case, solved in this process (a small one before, so that kernels are loaded)."""
    solve_stages(transformer_problem(Transformer(4, 512), KINDS[:1], (8,)))
    problem = transformer_problem(
        Transformer(case.layers, case.hidden),
        KINDS,
        case.available,
        microbatches=case.microbatches,
        objective=case.objective,
        noise=case.noise,
    )
    before = time.process_time()
    found = solve_stages(problem, seconds=seconds)
    processor = time.process_time() - before
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    answer = (found.seconds, processor, found.objective, found.bound, found.gap, found.status)
    return Row(case, len(problem.choices), len(found.stages), *answer, peak)


def measure_apart(case: Case, seconds: float) -> Row:
    """`measure` in a process of its own, so that its peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, case, seconds).result()


HEADER = (
    f"{'objective':<11}{'layers':>6}{'kinds':>6}{'devices':>8}{'B':>5}{'noise':>6}{'choices':>8}{'stages':>7}"
    f"{'seconds':>9}{'cpu s':>7}{'cost':>11}{'bound':>11}{'gap':>9}{'peak GB':>8}  status"
)


def line(row: Row) -> str:
    """A row of the printed table."""
    case = row.case
    return (
        f"{type(case.objective).__name__:<11}{case.layers:>6}{len(case.available):>6}{case.devices:>8}"
        f"{case.microbatches:>5}{case.noise:>6}{row.choices:>8}{row.stages:>7}{row.seconds:>9.2f}{row.processor:>7.2f}"
        f"{row.objective:>11.6f}{row.bound:>11.6f}{row.gap:>9.3%}{row.peak / 1e9:>8.2f}  {row.status}"
    )


def plot(rows: list[Row], path: Path) -> None:
    """Draw seconds and peak memory over the number of layers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modules: Any = pyplot
    figure, (left, right) = modules.subplots(1, 2, figsize=(9, 3.5))
    layers = [row.case.layers for row in rows]
    left.loglog(layers, [row.seconds for row in rows], "o-", label="wall clock")
    left.loglog(layers, [row.processor for row in rows], "s--", label="processor")
    left.legend()
    left.set_ylabel("seconds")
    right.plot(layers, [row.peak / 1e9 for row in rows], "o-")
    right.set_ylabel("peak memory of the process, GB")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("layers (4 kinds, 16/3 devices a layer)")
        axes.set_xticks(layers, [str(count) for count in layers])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@click.command("stages")
@click.option("--seconds", default=60.0, show_default=True, help="Time limit of each case.")
@click.option(
    "--more/--growth-only", default=True, help="Also other objectives and numbers of micro-batches."
)
@click.option(
    "--plot", "picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw the growth to a PNG."
)
def stage_bench_command(seconds: float, more: bool, picture: Path | None) -> None:
    """Solve stage problems of growing size and print time, gap and memory."""
    if seconds <= 0:
        raise click.BadParameter("must be above 0", param_hint="--seconds")
    click.echo(HEADER)
    rows: list[Row] = []
    for case in GROWTH + (MORE if more else ()):
        rows.append(measure_apart(case, seconds))
        click.echo(line(rows[-1]))
    if picture is not None:
        plot(rows[: len(GROWTH)], picture)
        click.echo(f"growth drawn to {picture}")


if __name__ == "__main__":
    stage_bench_command()
