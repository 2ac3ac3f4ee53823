"""`python -m autopar_solver solve ...` and `python -m autopar_solver bench DIR`, for use without the
facade.
"""

import click

from autopar_solver.bench import bench_command
from autopar_solver.cli import solve_command


@click.group()
def main() -> None:
    """Solve choice problems."""


main.add_command(solve_command, "solve")
main.add_command(bench_command, "bench")

if __name__ == "__main__":
    main(prog_name="autopar_solver")
