"""The solver's yardstick judges runs as its table says."""

from dataclasses import replace

import pytest

from autopar_solver.bench import Record, Row, Target

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
