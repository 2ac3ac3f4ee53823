"""The solver's yardstick: runs are judged as its table says, and problems for it can be generated."""

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from autopar_solver import generate
from autopar_solver.bench import Record, Row, Target
from autopar_solver.cli import generate_command
from autopar_solver.json_form import load_problem, problem_to_json

RUN = Record("X", 0, 60, 2, 1511272323, 1511160002, 1e-4, "feasible", 60.0, 2.0, 119.0, 2**30, 2.0)


@pytest.mark.parametrize(
    ("target", "verdict"),
    [
        (Target(60, 1512e6, 0.01), "met"),
        (Target(60, 1512e6, 1e-5), "missed: proof"),
        (Target(60, 1511e6, 0.01), "missed: cost"),
        (Target(60, 1511e6, 0.01, digits=4), "met as rounded"),
        (Target(60, 1.5112e9, 0.01, digits=5), "missed: cost"),
        (Target(60, 1512e6, 0.01, proof_seconds=20), "missed: proof time"),
    ],
)
def test_a_run_is_judged_by_its_target(target: Target, verdict: str) -> None:
    assert Row(target, RUN, 3).verdict == verdict


def test_rounding_counts_only_where_the_bound_rules_the_figure_out() -> None:
    loose = replace(RUN, bound=1510900000)
    assert Row(Target(60, 1511e6, 0.01, digits=4), loose, 3).verdict == "missed: cost"


@pytest.mark.parametrize("regime", ["small_core", "eliminated", "dense_core", "large_choices"])
def test_a_generated_problem_is_the_one_its_function_gives(regime: str, tmp_path: Path) -> None:
    out = tmp_path / "problem.json.gz"
    arguments = [regime, "--nodes", "30", "--seed", "3", "--out", str(out)]
    answer = CliRunner().invoke(generate_command, arguments)
    assert answer.exit_code == 0, answer.output
    assert "30 nodes" in answer.output
    made = getattr(generate, regime)(30, 3)
    assert problem_to_json(load_problem(out)) == problem_to_json(made)


def test_a_folder_that_is_not_there_is_a_plain_error(tmp_path: Path) -> None:
    out = tmp_path / "nowhere" / "problem.json"
    answer = CliRunner().invoke(generate_command, ["small_core", "--nodes", "5", "--out", str(out)])
    assert answer.exit_code == 1
    assert "cannot write" in answer.output
