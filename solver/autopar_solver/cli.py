"""`solve PROBLEM --seconds N --out SOL.json`, which the facade mounts as `autopar solve`, and `generate`."""

import sys

import click
from rich.console import Console
from rich.live import Live
from rich.text import Text

from autopar_solver.choice import Choice, Progress
from autopar_solver.errors import ProblemError
from autopar_solver.generate import dense_core, eliminated, large_choices, small_core
from autopar_solver.json_form import load_problem, save_problem, write_whole
from autopar_solver.solve import solve

REGIMES = {f.__name__: f for f in (small_core, eliminated, dense_core, large_choices)}


@click.command("solve")
@click.argument("problem", type=click.Path(dir_okay=False))
@click.option("--seconds", type=float, default=60.0, show_default=True, help="Wall-clock limit.")
@click.option("--out", type=click.Path(dir_okay=False), help="Where to write the solution as JSON.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Same seed, same answer, if time doesn't bind."
)
@click.option(
    "--gap", type=float, default=0.0, show_default=True, help="Stop within this share of the optimum."
)
@click.option("--workers", type=int, help="Threads; one per core if left out.")
@click.option("--solver", default="auto", show_default=True, help='"auto", "cvxpy" or "cvxpy:NAME".')
def solve_command(
    problem: str, seconds: float, out: str | None, seed: int, gap: float, workers: int | None, solver: str
) -> None:
    """Solve a choice problem (JSON, ours or the contest's, .gz or not), printing best, bound and gap as it
    goes.
    """
    console = Console(stderr=True)
    try:
        loaded = load_problem(problem)
        console.print(Text(repr(loaded)))
        with Live(console=console, transient=True, refresh_per_second=4) as live:
            choice = solve(
                loaded, seconds=seconds, seed=seed, gap=gap, workers=workers, solver=solver,
                progress=lambda p: live.update(Text(progress_line(p))),
            )  # fmt: skip
        if out is not None:
            write_whole(out, (choice.to_json() + "\n").encode())
    except (ProblemError, OSError) as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException("interrupted before a choice was found; nothing was written") from None
    for line in choice.log:
        console.print(Text(line, style="dim"))
    click.echo(result_line(choice))
    if choice.index is None:
        sys.exit(1)


@click.command("generate")
@click.argument("regime", type=click.Choice(list(REGIMES)))
@click.option("--nodes", type=click.IntRange(1), help="How many; the regime's usual number if left out.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same problem.")
@click.option(
    "--out", type=click.Path(dir_okay=False), required=True, help="File to write: .json or .json.gz."
)
def generate_command(regime: str, nodes: int | None, seed: int, out: str) -> None:
    """Write a random problem of one of the four REGIMEs that sharding problems come in."""
    problem = REGIMES[regime](seed=seed) if nodes is None else REGIMES[regime](nodes, seed)
    try:
        save_problem(problem, out)
    except OSError as error:
        raise click.ClickException(f"cannot write {out}: {error}") from None
    click.echo(repr(problem))


def progress_line(p: Progress) -> str:
    """Returns the live line: time, best, bound, gap, doing."""
    best = f"best {number(p.objective)}  bound {number(p.bound)}  gap {percent(p.gap)}"
    return f"{p.seconds:6.1f} s  {best}  {p.doing}"


def result_line(c: Choice) -> str:
    """Returns the last line: what was found."""
    best = f"cost {number(c.objective)}, bound {number(c.bound)}, gap {percent(c.gap)}"
    return f"{c.status}: {best}, {c.seconds:.1f} s"


def number(value: int | None) -> str:
    """Returns a cost for people."""
    return "-" if value is None else f"{value:,}"


def percent(gap: float) -> str:
    """Returns a gap in percent."""
    return "-" if gap == float("inf") else f"{100 * gap:.4f} %"
