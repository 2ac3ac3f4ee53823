"""solve() as a caller sees it: JSON in both forms, bad input, limits, interrupts, seeds, other solvers."""

import gc
import gzip
import itertools
import json
import math
import threading
import time

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from autopar_solver import (
    FORBIDDEN,
    ChoiceProblem,
    ProblemError,
    load_problem,
    problem_from_json,
    problem_to_json,
    save_problem,
    solve,
)
from autopar_solver.bench import bench_command, instance_name
from autopar_solver.cli import solve_command
from autopar_solver.generate import dense_core, eliminated, large_choices, random_sharding, small_core
from autopar_solver.json_form import write_whole
from autopar_solver.presolve import collector_paused
from autopar_solver.reference import brute_force, tiny_problem

SMALL_PROBLEMS = st.builds(tiny_problem, st.integers(0, 2**48))

TINY = ChoiceProblem.build(
    [[5, 1, 9], [0, 4]],
    [(0, 1)],
    [[[0, 3], [7, FORBIDDEN], [2, 2]]],
    [[(0, 2, [10, 30, 5])], [(1, 3, [4, 8])]],
    20,
)
CONTEST = {
    "problem": {
        "name": "tiny",
        "nodes": {
            "intervals": [[0, 2], [1, 3]],
            "costs": [[5, 1, 9], [0, 4]],
            "usages": [[10, 30, 5], [4, 8]],
        },
        "edges": {"nodes": [[0, 1]], "costs": [[0, 3, 7, 10**18, 2, 2]]},
        "usage_limit": 20,
    }
}


def same(a: ChoiceProblem, b: ChoiceProblem) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)


def test_tiny_by_hand():
    got = solve(TINY, seconds=10)
    assert (got.status, got.objective, got.bound, got.gap) == ("optimal", 5, 5, 0.0)
    assert got.index is not None and got.index.tolist() == [0, 0]
    assert (
        TINY.cost([1, 0]) == 8 and "uses 14 more than the limit of 20 at time step 1" in TINY.check([1, 0])[0]
    )
    assert TINY.usage([0, 1]).tolist() == [10, 18, 8]
    assert TINY.check([1, 1]) != [] and TINY.cost([1, 1]) >= FORBIDDEN


@given(SMALL_PROBLEMS)
@settings(max_examples=50, deadline=None)
def test_our_json_keeps_everything(p: ChoiceProblem):
    assert same(problem_from_json(json.loads(json.dumps(problem_to_json(p)))), p)


def test_contest_json_and_gzip(tmp_path):
    assert same(problem_from_json(CONTEST), TINY)
    with gzip.open(tmp_path / "x.json.gz", "wt") as out:
        json.dump(CONTEST, out)
    assert same(load_problem(tmp_path / "x.json.gz"), TINY)
    save_problem(TINY, tmp_path / "y.json.gz")
    assert same(load_problem(tmp_path / "y.json.gz"), TINY)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c["nodes"].update(costs=[[5, 1], [0, 4]]), "node 0 has 3 usages for 2 costs"),
        (lambda c: c["edges"].update(costs=[[0, 3, 7]]), "edge 0 has 3 costs, expected 6"),
        (lambda c: c["edges"].update(nodes=[[0, 7]]), "nodes below 2"),
        (lambda c: c["nodes"].update(intervals=[[3, 1], [1, 3]]), r"interval \[3, 1\)"),
        (lambda c: c["nodes"].update(intervals=[[-1, 1], [1, 3]]), r"interval \[-1, 1\)"),
        (lambda c: c["nodes"].update(usages=[[10, -30, 5], [4, 8]]), "negative"),
        (lambda c: c["nodes"].update(costs=[[5, 1, 2**58], [2**58, 4]]), "overflow"),
        (lambda c: c["nodes"].update(costs=[[5, 1, "x"], [0, 4]]), "expected integers"),
        (lambda c: c["nodes"].update(costs=[[5, 1, 0.5], [0, 4]]), "expected integers"),
        (lambda c: c["nodes"].update(costs=[[5, 1, 10**30], [0, 4]]), "integers"),
        (lambda c: c.pop("edges"), "missing 'edges'"),
        (lambda c: c["nodes"].update(costs=[[], [0, 4]], usages=[[], [4, 8]]), "no choice"),
    ],
)
def test_malformed_problems_say_what_is_wrong(change, words):
    form = json.loads(json.dumps(CONTEST))
    change(form["problem"])
    with pytest.raises(ProblemError, match=words):
        problem_from_json(form)


@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan])
def test_senseless_time_limits_are_refused(seconds):
    with pytest.raises(ProblemError, match="positive number of seconds"):
        solve(TINY, seconds=seconds)


def test_a_limit_too_low_says_by_how_much_and_where():
    form = json.loads(json.dumps(CONTEST))
    form["problem"]["usage_limit"] = 7
    got = solve(problem_from_json(form), seconds=5)
    assert got.status == "infeasible" and got.index is None
    assert "limit of 7 at time step 1 is 2 below the least possible usage there, 9" in got.log[-1]


def test_the_same_seed_gives_the_same_choice():
    p = random_sharding(120, seed=2, tightness=1.05, resident=0.3)
    first, second = (solve(p, seconds=60, seed=4) for _ in range(2))
    assert first.status == "optimal" and np.array_equal(first.index, second.index)


def test_an_interrupt_returns_the_best_so_far():
    p = dense_core(1200, seed=1)

    def interrupt_later(progress):
        if progress.objective is not None and progress.seconds > 3:
            raise KeyboardInterrupt

    began = time.monotonic()
    got = solve(p, seconds=300, progress=interrupt_later)
    assert time.monotonic() - began < 120
    assert got.status == "feasible" or got.status == "optimal"
    assert got.index is not None and p.check(got.index) == [] and p.cost(got.index) == got.objective
    assert threading.active_count() < 10


@pytest.mark.parametrize("make", [small_core, eliminated, dense_core, large_choices])
def test_generators_make_feasible_problems(make):
    p = make(60, seed=1)
    got = solve(p, seconds=30, gap=0.05)
    assert (
        got.index is not None and p.check(got.index) == [] and got.bound <= got.objective == p.cost(got.index)
    )


@given(SMALL_PROBLEMS)
@settings(max_examples=25, deadline=None)
def test_cvxpy_agrees_with_brute_force(p: ChoiceProblem):
    pytest.importorskip("cvxpy")
    best = brute_force(p)
    got = solve(p, seconds=20, solver="cvxpy")
    assert got.status == ("infeasible" if best is None else "optimal") and got.objective == best


def test_unknown_solvers_are_refused():
    with pytest.raises(ProblemError, match='must be "auto", "cvxpy"'):
        solve(TINY, seconds=1, solver="gurobi")
    pytest.importorskip("cvxpy")
    with pytest.raises(ProblemError, match="no solver 'NOPE'"):
        solve(TINY, seconds=1, solver="cvxpy:NOPE")


def test_command_line_writes_the_solution(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(CONTEST))
    out = tmp_path / "s.json"
    got = CliRunner().invoke(solve_command, [str(tmp_path / "p.json"), "--seconds", "5", "--out", str(out)])
    assert got.exit_code == 0 and "optimal: cost 5" in got.stdout
    form = json.loads(out.read_text())
    assert (
        form["choice"] == [0, 0] and form["objective"] == form["bound"] == 5 and form["status"] == "optimal"
    )


@pytest.mark.parametrize(
    "text, words", [("{", "is not JSON"), ("[]", "expected an object"), ('{"problem": 3}', "form")]
)
def test_command_line_says_what_is_wrong_without_a_traceback(tmp_path, text, words):
    (tmp_path / "p.json").write_text(text)
    got = CliRunner().invoke(solve_command, [str(tmp_path / "p.json"), "--out", str(tmp_path / "s.json")])
    assert got.exit_code == 1 and words in got.output and "Traceback" not in got.output
    assert not (tmp_path / "s.json").exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError):
        write_whole(tmp_path / "there", b"x")
    assert [f.name for f in tmp_path.iterdir()] == ["there"]


def test_bench_prints_a_table(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(CONTEST))
    got = CliRunner().invoke(bench_command, [str(tmp_path)])
    assert got.exit_code == 0 and "TINY" in got.output and "optimal" in got.output
    assert "no instance Q" in CliRunner().invoke(bench_command, [str(tmp_path), "--only", "Q"]).output
    assert instance_name(tmp_path / "contest-2025-K.json.gz") == "K"


def test_bench_keeps_finished_runs_and_does_not_repeat_them(tmp_path):
    (tmp_path / "tiny.json").write_text(json.dumps(CONTEST))
    kept = tmp_path / "kept.runs"
    arguments = [str(tmp_path), "--only", "TINY", "--keep", str(kept)]
    assert CliRunner().invoke(bench_command, arguments).exit_code == 0
    records = json.loads(kept.read_text())
    assert len(records) == 1 and records[0]["status"] == "optimal" and records[0]["peak_bytes"] > 2**20
    records[0]["objective"] = 424242
    kept.write_text(json.dumps(records))
    assert "424242" in CliRunner().invoke(bench_command, arguments).output
    assert "424242" not in CliRunner().invoke(bench_command, [*arguments, "--scale", "0.5"]).output
    kept.write_text("{")
    assert "doesn't hold finished runs" in CliRunner().invoke(bench_command, arguments).output


def test_cycles_left_when_the_collector_was_paused_are_found_as_others_are():
    """They are among the young: counted as old, nothing would look for them until much else has grown old."""
    with collector_paused():
        kept = [[] for _ in range(10)]
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == 0
    assert id(kept) not in {id(x) for x in gc.get_objects(generation=2)}


def test_the_time_limit_is_of_the_clock_given():
    problem = dense_core(60)
    ticks = itertools.count(0.0, 50.0)  # every look at this clock is 50 seconds later
    found = solve(problem, seconds=100.0, clock=lambda: next(ticks))
    assert found.seconds >= 100.0
