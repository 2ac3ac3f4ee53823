"""The solver's yardstick: the contest's instances against the costs and proofs we mean to reach.

Every run has a process of its own, so that its peak memory is its own; finished runs are kept in a file, so
that a long table can be made in several calls.
"""

import json
import multiprocessing
import os
import re
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from autopar_solver.choice import Choice
from autopar_solver.errors import ProblemError
from autopar_solver.json_form import load_problem, write_whole
from autopar_solver.solve import solve


@dataclass(frozen=True)
class Target:
    """What an instance asks for: seconds, a cost, and a gap (0: optimal) within proof_seconds.

    digits: the significant digits of a cost that is known only rounded.
    """

    seconds: float
    cost: float
    gap: float
    proof_seconds: float | None = None
    digits: int | None = None


TARGETS = {
    "A": Target(60, 6548553650, 0, 20),
    "B": Target(60, 532843, 0, 5),
    "C": Target(60, 84102392580, 0, 40),
    "D": Target(60, 309.2e9, 1e-3),
    "G": Target(120, 217039, 0, 5),
    "L": Target(180, 1.9685e9, 0.03),
    "M": Target(180, 49.928e9, 1e-3),
    "N": Target(180, 199.4e9, 0.043),
    "P": Target(240, 651833115436, 0, 10),
    "S": Target(240, 1.511e9, 0.01, digits=4),
    "U": Target(300, 2.30e9, 0.11),
}
TABLE_WIDTH = 150
DEFAULT = Target(60, float("inf"), float("inf"))


@dataclass(frozen=True)
class Record:
    """One run: what was asked and what came of it. load: the machine's load average when it ended."""

    name: str
    seed: int
    limit: float
    workers: int | None
    objective: int | None
    bound: int | None
    gap: float | None
    status: str
    seconds: float
    presolve_seconds: float
    processor_seconds: float
    peak_bytes: int
    load: float

    def answers(self, name: str, seed: int, limit: float, workers: int | None) -> bool:
        """Whether this is the run asked for."""
        return (self.name, self.seed, self.limit, self.workers) == (name, seed, limit, workers)


@dataclass(frozen=True)
class Row:
    """One line of the table: the median run of an instance by cost, and how many there were."""

    target: Target
    run: Record
    runs: int

    @property
    def verdict(self) -> str:
        """ "met", "met as rounded" where the proven bound shows that the figure can't be met otherwise, or
        what was missed.
        """
        r, t = self.run, self.target
        proven = r.status == "optimal" or (t.gap > 0 and r.gap is not None and r.gap <= t.gap)
        missed = [
            "" if self.cost_met or self.met_as_rounded else "cost",
            "" if proven else "proof",
            "proof time" if t.proof_seconds is not None and r.seconds > t.proof_seconds else "",
        ]
        if any(missed):
            return "missed: " + ", ".join(m for m in missed if m)
        return "met" if self.cost_met else "met as rounded"

    @property
    def cost_met(self) -> bool:
        """Whether the cost is at most the one asked for."""
        return self.run.objective is not None and self.run.objective <= self.target.cost

    @property
    def met_as_rounded(self) -> bool:
        """Whether the cost rounds to the one asked for, which no choice can cost: the bound is above it."""
        r, t = self.run, self.target
        if t.digits is None or r.objective is None or r.bound is None or r.bound <= t.cost:
            return False
        return float(f"{r.objective:.{t.digits - 1}e}") <= t.cost


@click.command("solver")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--only", default="", help="Instances to run, by the letter their file name ends in: A,B.")
@click.option(
    "--seeds", type=int, default=3, show_default=True, help="Runs per instance that isn't proven optimal."
)
@click.option("--workers", type=int, help="Threads; one per core if left out.")
@click.option("--scale", type=float, default=1.0, show_default=True, help="Multiplies every time limit.")
@click.option(
    "--keep",
    type=click.Path(dir_okay=False, path_type=Path),
    help="JSON file of finished runs: they aren't run again, and the table can be made in several calls.",
)
def bench_command(
    folder: Path, only: str, seeds: int, workers: int | None, scale: float, keep: Path | None
) -> None:
    """Run the choice-problem instances of FOLDER and print cost, bound and time against the targets."""
    wanted = {name.strip().upper() for name in only.split(",") if name.strip()}
    files = [f for f in sorted(folder.glob("*.json*")) if not wanted or instance_name(f) in wanted]
    if not files:
        raise click.ClickException(f"no instance {only or '*.json, *.json.gz'} in {folder}")
    console, kept = Console(soft_wrap=True), Kept(keep)
    rows: list[Row] = []
    for file in files:
        try:
            rows.append(row_of(file, seeds, workers, scale, kept, lambda r: console.print(line(r))))
        except ProblemError as error:
            raise click.ClickException(f"{file.name}: {error}") from None
    Console(width=max(console.width, TABLE_WIDTH)).print(table(rows))
    if any(row.verdict.startswith("missed") for row in rows):
        sys.exit(1)


def instance_name(file: Path) -> str:
    """Returns the letter at the end of a contest instance's name, or the whole stem."""
    stem = file.name.split(".json")[0]
    found = re.search(r"-([A-Z])$", stem)
    return found[1] if found else stem.upper()


class Kept:
    """Finished runs, in a file if one is given."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.records: list[Record] = []
        if path is not None and path.exists():
            try:
                self.records = [Record(**form) for form in json.loads(path.read_text())]
            except (ValueError, TypeError) as error:
                raise click.ClickException(
                    f"{path} doesn't hold finished runs ({error}); delete it"
                ) from None

    def find(self, name: str, seed: int, limit: float, workers: int | None) -> Record | None:
        """Returns the run asked for, if it was made."""
        return next((r for r in self.records if r.answers(name, seed, limit, workers)), None)

    def add(self, record: Record) -> None:
        """Keeps a run; the file is replaced as a whole."""
        self.records.append(record)
        if self.path is not None:
            write_whole(str(self.path), json.dumps([asdict(r) for r in self.records], indent=1).encode())


def row_of(
    file: Path,
    seeds: int,
    workers: int | None,
    scale: float,
    kept: Kept,
    say: Callable[[Record], None],
) -> Row:
    """Returns the run with the median cost; one run is enough if it is proven optimal."""
    name = instance_name(file)
    target = TARGETS.get(name, DEFAULT)
    limit = target.seconds * scale
    runs: list[Record] = []
    for seed in range(max(1, seeds)):
        found = kept.find(name, seed, limit, workers)
        if found is None:
            found = run_apart(file, seed, limit, workers)
            kept.add(found)
        say(found)
        runs.append(found)
        if found.status == "optimal":
            return Row(target, found, seed + 1)
    runs.sort(key=lambda r: 2**63 if r.objective is None else r.objective)
    return Row(target, runs[(len(runs) - 1) // 2], len(runs))


def run_apart(file: Path, seed: int, limit: float, workers: int | None) -> Record:
    """Returns one run, made in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_here, file, seed, limit, workers).result()


def run_here(file: Path, seed: int, limit: float, workers: int | None) -> Record:
    """Returns one run, made in this process."""
    choice: Choice = solve(load_problem(file), seconds=limit, seed=seed, workers=workers)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Record(
        instance_name(file),
        seed,
        limit,
        workers,
        choice.objective,
        choice.bound,
        choice.gap if choice.gap != float("inf") else None,
        choice.status,
        round(choice.seconds, 2),
        round(choice.presolve_seconds, 2),
        round(used.ru_utime + used.ru_stime, 2),
        used.ru_maxrss * 1024,
        round(os.getloadavg()[0], 2),
    )


HEADINGS = (
    "instance", "limit s", "cost", "at most", "bound", "gap", "asked", "seconds", "presolve s", "peak GiB",
    "runs", "verdict",
)  # fmt: skip


def cells(row: Row) -> tuple[str, ...]:
    """Returns a row's cells as text."""
    r, t = row.run, row.target
    proof = "optimal" if t.gap == 0 else f"gap <= {100 * t.gap:g} %"
    proof += f", {t.proof_seconds:g} s" if t.proof_seconds else ""
    return (
        r.name, f"{r.limit:g}", f"{r.objective}", f"{t.cost:.12g}", f"{r.bound}", gap_of(r), proof,
        f"{r.seconds:.1f}", f"{r.presolve_seconds:.1f}", f"{r.peak_bytes / 2**30:.2f}", str(row.runs),
        row.verdict,
    )  # fmt: skip


def gap_of(r: Record) -> str:
    """Returns a run's gap for people."""
    return "optimal" if r.status == "optimal" else "-" if r.gap is None else f"{100 * r.gap:.3f} %"


def table(rows: list[Row]) -> Table:
    """Returns the table of all rows."""
    out = Table(*HEADINGS)
    for row in rows:
        out.add_row(*cells(row))
    return out


def line(r: Record) -> str:
    """Returns a run as one line."""
    return (
        f"{r.name} seed {r.seed}: cost {r.objective}, bound {r.bound}, gap {gap_of(r)}, {r.seconds:.1f} s of "
        f"{r.limit:g} (presolve {r.presolve_seconds:.1f}), processor {r.processor_seconds:.0f} s, "
        f"load {r.load:.1f}, peak {r.peak_bytes / 2**30:.2f} GiB"
    )
