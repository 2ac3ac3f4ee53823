"""`python -m autopar_solver solve …`, `generate …` and `bench DIR`, for use without the facade."""

import click

from autopar_solver.bench import bench_command
from autopar_solver.cli import generate_command, solve_command


@click.group()
def main() -> None:
    """Solve choice problems."""


main.add_command(solve_command, "solve")
main.add_command(generate_command, "generate")
main.add_command(bench_command, "bench")

if __name__ == "__main__":
    main(prog_name="autopar_solver")
