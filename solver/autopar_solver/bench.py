"""The solver's yardstick: the contest's instances against the costs and proofs we mean to reach."""

import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from autopar_solver.choice import Choice
from autopar_solver.errors import ProblemError
from autopar_solver.json_form import load_problem
from autopar_solver.solve import solve


@dataclass(frozen=True)
class Target:
    """What an instance asks for: seconds, a cost, and a gap (0: optimal) within proof_seconds."""

    seconds: float
    cost: float
    gap: float
    proof_seconds: float | None = None


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
    "S": Target(240, 1.511e9, 0.01),
    "U": Target(300, 2.30e9, 0.11),
}
DEFAULT = Target(60, float("inf"), float("inf"))


@dataclass(frozen=True)
class Row:
    """One line of the table: the median run of an instance, and the whole time it took with reading."""

    name: str
    target: Target
    choice: Choice
    runs: int

    @property
    def verdict(self) -> str:
        """ "met", or what was missed."""
        c, t = self.choice, self.target
        missed = [
            "cost" if c.objective is None or c.objective > t.cost else "",
            "proof" if (c.status != "optimal" if t.gap == 0 else c.gap > t.gap) else "",
            "proof time" if t.proof_seconds is not None and c.seconds > t.proof_seconds else "",
        ]
        return "met" if not any(missed) else "missed: " + ", ".join(m for m in missed if m)


@click.command("solver")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--only", default="", help="Instances to run, by the letter their file name ends in: A,B.")
@click.option(
    "--seeds", type=int, default=3, show_default=True, help="Runs per instance that isn't proven optimal."
)
@click.option("--workers", type=int, help="Threads; one per core if left out.")
@click.option("--scale", type=float, default=1.0, show_default=True, help="Multiplies every time limit.")
def bench_command(folder: Path, only: str, seeds: int, workers: int | None, scale: float) -> None:
    """Run the choice-problem instances of FOLDER and print cost, bound and time against the targets."""
    wanted = {name.strip().upper() for name in only.split(",") if name.strip()}
    files = [f for f in sorted(folder.glob("*.json*")) if not wanted or instance_name(f) in wanted]
    if not files:
        raise click.ClickException(f"no instance {only or '*.json, *.json.gz'} in {folder}")
    console = Console()
    rows: list[Row] = []
    for file in files:
        try:
            rows.append(run_instance(file, seeds, workers, scale))
        except ProblemError as error:
            raise click.ClickException(f"{file.name}: {error}") from None
        console.print(describe(rows[-1]), highlight=False)
    console.print(table(rows))
    if any(row.verdict != "met" for row in rows):
        sys.exit(1)


def instance_name(file: Path) -> str:
    """Returns the letter at the end of a contest instance's name, or the whole stem."""
    stem = file.name.split(".json")[0]
    found = re.search(r"-([A-Z])$", stem)
    return found[1] if found else stem.upper()


def run_instance(file: Path, seeds: int, workers: int | None, scale: float) -> Row:
    """Returns the run with the median cost; one run is enough if it is proven optimal."""
    name = instance_name(file)
    target = TARGETS.get(name, DEFAULT)
    problem = load_problem(file)
    choices: list[Choice] = []
    for seed in range(max(1, seeds)):
        choices.append(solve(problem, seconds=target.seconds * scale, seed=seed, workers=workers))
        if choices[-1].status == "optimal":
            return Row(name, target, choices[-1], seed + 1)
    costs = [c.objective if c.objective is not None else 2**63 for c in choices]
    middle = statistics.median_low(costs)
    return Row(name, target, choices[costs.index(middle)], len(choices))


def cells(row: Row) -> tuple[str, ...]:
    """Returns a row's cells as text."""
    c, t = row.choice, row.target
    proof = "optimal" if t.gap == 0 else f"gap <= {100 * t.gap:g} %"
    proof += f", {t.proof_seconds:g} s" if t.proof_seconds else ""
    gap = "optimal" if c.status == "optimal" else f"{100 * c.gap:.3f} %"
    return (
        row.name, f"{t.seconds:g}", f"{c.objective}", f"{t.cost:.10g}", f"{c.bound}", gap, proof,
        f"{c.seconds:.1f}", str(row.runs), row.verdict,
    )  # fmt: skip


HEADINGS = ("instance", "limit s", "cost", "at most", "bound", "gap", "asked", "seconds", "runs", "verdict")


def table(rows: list[Row]) -> Table:
    """Returns the table of all rows."""
    out = Table(*HEADINGS)
    for row in rows:
        out.add_row(*cells(row))
    return out


def describe(row: Row) -> str:
    """Returns a row as one line."""
    return "  ".join(f"{heading} {cell}" for heading, cell in zip(HEADINGS, cells(row)))
