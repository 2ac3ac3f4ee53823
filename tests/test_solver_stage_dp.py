"""The stage program against brute force, closed forms and its own promises."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from click.testing import CliRunner

from autopar_solver.stage_dp import (
    Latency,
    StageProblem,
    StageProblemError,
    Stages,
    SubmeshChoice,
    Throughput,
    TrainStep,
    gpipe,
    inference,
    one_f_one_b,
    price,
    solve_stages,
)
from autopar_solver.stage_dp_bench import Case, line, measure, stage_bench_command
from autopar_solver.stage_dp_instances import KINDS, Transformer, transformer_problem

OBJECTIVES = (
    TrainStep(),
    TrainStep(transfer_blocks=True),
    Latency(),
    Throughput(),
    Throughput(transfer_blocks=True),
)


def random_problem(seed: int) -> StageProblem:
    """A small problem with ties, impossible runs, forbidden crossings, tight memory and few devices."""
    rng = np.random.default_rng(seed)
    kinds, layers, count = int(rng.integers(1, 4)), int(rng.integers(1, 6)), int(rng.integers(1, 4))
    shape = (count, layers, layers + 1)
    time = rng.integers(1, 20, shape).astype(float) if rng.random() < 0.5 else rng.random(shape)
    time[rng.random(shape) < 0.15] = np.inf
    transfer = rng.random((layers, kinds, kinds)) * rng.choice([0, 0.3, 3])
    transfer[rng.random(transfer.shape) < 0.1] = np.inf
    tight, microbatches = rng.random() < 0.7, int(rng.integers(1, 7))
    return StageProblem(
        choices=tuple(SubmeshChoice(int(rng.integers(kinds)), int(rng.integers(1, 4))) for _ in range(count)),
        available=tuple(int(x) for x in rng.integers(0, 8, kinds)),
        time=time,
        transfer=transfer,
        fixed=rng.random(shape) * rng.choice([0, 0.2, 3]),
        memory_fixed=rng.random(shape),
        memory_per_microbatch=rng.random(shape) / 2,
        limit=rng.random(count) * 2.5 if tight else np.full((), np.inf),
        microbatches=microbatches,
        in_flight=((), gpipe(microbatches), inference())[rng.integers(3)],
        objective=OBJECTIVES[rng.integers(len(OBJECTIVES))],
        max_stages=int(rng.integers(1, layers + 1)) if rng.random() < 0.3 else None,
    )


def all_plans(problem: StageProblem, start: int = 0, left: tuple[int, ...] | None = None) -> Iterator[Stages]:
    left = problem.available if left is None else left
    if start == problem.layers:
        yield ()
        return
    for stop in range(start + 1, problem.layers + 1):
        for c, choice in enumerate(problem.choices):
            if left[choice.kind] >= choice.devices:
                rest = tuple(n - choice.devices * (k == choice.kind) for k, n in enumerate(left))
                for plan in all_plans(problem, stop, rest):
                    yield ((start, stop, c), *plan)


def cost_and_shortfall(p: StageProblem, plan: Stages) -> tuple[float, float]:
    """The documented objective and memory rule, written once more and plainly."""
    kinds = [p.choices[c].kind for _, _, c in plan]
    times = [p.time[c, i, j] for i, j, c in plan]
    moves = [p.transfer[plan[n][1], kinds[n], kinds[n + 1]] for n in range(len(plan) - 1)] + [0.0]
    blocks = getattr(p.objective, "transfer_blocks", False)
    slowest = max(t + x if blocks else t for t, x in zip(times, moves))
    shortfall = 0.0
    for n, (i, j, c) in enumerate(plan):
        position = len(plan) - n
        kept = p.in_flight[min(position, len(p.in_flight)) - 1]
        shortfall = max(
            shortfall, p.memory_fixed[c, i, j] + kept * p.memory_per_microbatch[c, i, j] - p.limit[c]
        )
    total = sum(times) + sum(moves)
    if not np.isfinite(total):
        return np.inf, shortfall
    match p.objective:
        case TrainStep():
            fixed = max(p.fixed[c, i, j] for i, j, c in plan)
            return total + (p.microbatches - 1) * slowest + fixed, shortfall
        case Latency():
            return total, shortfall
        case _:
            return slowest, shortfall


def brute_force(problem: StageProblem) -> tuple[float, float]:
    """(least cost of a plan that fits, least shortfall of any plan); inf where there is none."""
    best = least = np.inf
    for plan in all_plans(problem):
        if len(plan) > (problem.max_stages or problem.layers):
            continue
        cost, shortfall = cost_and_shortfall(problem, plan)
        if np.isfinite(cost):
            least = min(least, shortfall)
            best = min(best, cost) if shortfall <= 0 else best
    return best, least


@pytest.mark.parametrize("block", range(8))
def test_equals_brute_force(block: int):
    for seed in range(100 * block, 100 * block + 100):
        problem = random_problem(seed)
        best, least = brute_force(problem)
        found = solve_stages(problem)
        if np.isinf(best):
            assert found.status == "infeasible" and found.stages == (), seed
            assert (found.missing is None) == np.isinf(least), seed
            if found.missing is not None:
                assert found.missing.bytes == pytest.approx(least, rel=2e-6), seed
                assert found.missing.bound <= least <= found.missing.bytes * (1 + 1e-12), seed
                assert price(problem, found.missing.stages).shortfall == found.missing.bytes, seed
        else:
            assert found.status == "optimal" and found.gap <= 1e-9 * 1.001, seed
            assert found.objective == pytest.approx(best, rel=1e-9), seed
            assert found.bound <= best, seed
            cost, shortfall = cost_and_shortfall(problem, found.stages)
            assert found.objective == pytest.approx(cost, rel=1e-12) and shortfall <= 0, seed
            assert all(r.objective >= best * (1 - 1e-12) and r.shortfall == 0 for r in found.runner_ups), seed


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
def test_medium_transformer_equals_a_plain_dynamic_program(objective: TrainStep | Latency | Throughput):
    problem = transformer_problem(
        Transformer(8, 4096), (KINDS[1], KINDS[3]), (4, 6), microbatches=5, objective=objective, noise=0.2
    )
    found = solve_stages(problem)
    best, _ = brute_force_pruned(problem)
    assert found.status == "optimal" and found.objective == pytest.approx(best, rel=1e-9)


def brute_force_pruned(problem: StageProblem) -> tuple[float, int]:
    """Brute force that leaves a plan as soon as its stage times alone cost more than the best plan."""
    best, count = np.inf, 0

    def extend(plan: Stages, start: int, left: tuple[int, ...], total: float, slowest: float):
        nonlocal best, count
        weights = problem.weights
        if weights.total * total + weights.slowest * slowest >= best:
            return
        if start == problem.layers:
            count += 1
            cost, shortfall = cost_and_shortfall(problem, plan)
            best = min(best, cost) if shortfall <= 0 else best
            return
        for stop in range(problem.layers, start, -1):
            for c, choice in enumerate(problem.choices):
                if left[choice.kind] >= choice.devices:
                    t = float(problem.time[c, start, stop])
                    rest = tuple(n - choice.devices * (k == choice.kind) for k, n in enumerate(left))
                    extend((*plan, (start, stop, c)), stop, rest, total + t, max(slowest, t))

    extend((), 0, problem.available, 0.0, 0.0)
    return best, count


def uniform(layers: int, devices: int, **more: object) -> StageProblem:
    """Equal layers of 1 second on single devices of one kind."""
    time = np.maximum(np.arange(layers + 1)[None, None, :] - np.arange(layers)[None, :, None], 0.0)
    return StageProblem((SubmeshChoice(0, 1),), (devices,), time, **more)  # type: ignore[arg-type]


def test_equal_layers_are_shared_evenly():
    found = solve_stages(uniform(12, 4, microbatches=10))
    assert [stop - start for start, stop, _ in found.stages] == [3, 3, 3, 3]
    assert found.objective == 12 + 9 * 3 and found.slowest == 3


def test_a_transfer_that_costs_more_than_it_gains_is_avoided():
    found = solve_stages(uniform(12, 4, microbatches=10, transfer=np.full((), 100.0)))
    assert found.stages == ((0, 12, 0),)


def test_memory_depends_on_the_position_from_the_end():
    more = {"microbatches": 8, "memory_per_microbatch": np.full((), 1.0), "limit": np.full((), 3.0)}
    assert len(solve_stages(uniform(12, 12, **more)).stages) == 3  # 1F1B keeps p micro-batches at position p
    assert solve_stages(uniform(12, 12, **more, in_flight=gpipe(8))).status == "infeasible"
    assert len(solve_stages(uniform(12, 12, **more, in_flight=inference())).stages) == 12
    assert one_f_one_b(3) == (1, 2, 3)


def test_missing_memory_names_bytes_and_stage():
    time = np.ones((1, 2, 3))
    need = np.zeros((1, 2, 3))
    need[0, 0, 1], need[0, 1, 2], need[0, 0, 2] = 10e9, 24e9, 33e9
    found = solve_stages(
        StageProblem((SubmeshChoice(0, 1),), (2,), time, memory_fixed=need, limit=np.full((), 16e9))
    )
    assert found.status == "infeasible" and found.missing is not None
    assert found.missing.bytes == 8e9 and found.missing.stages[found.missing.stage] == (1, 2, 0)


def test_runner_ups_are_other_mixes_best_first():
    problem = transformer_problem(Transformer(12, 4096), KINDS, (8, 8, 8, 8))
    found = solve_stages(problem, runner_ups=3)
    costs = [plan.objective for plan in found.runner_ups]
    mixes = [
        tuple(sorted(c for _, _, c in plan)) for plan in (found.stages, *(r.stages for r in found.runner_ups))
    ]
    assert costs == sorted(costs) and costs[0] >= found.objective
    assert len(set(mixes)) == len(mixes)
    assert solve_stages(problem, runner_ups=0).runner_ups == ()


def test_a_time_limit_gives_a_plan_and_a_valid_bound():
    problem = transformer_problem(Transformer(24, 12288), KINDS, (8, 8, 24, 24), noise=0.3)
    best = solve_stages(problem)
    seen: list[tuple[float, float, float, float]] = []
    early = solve_stages(problem, seconds=0.05, progress=lambda *line: seen.append(line))
    assert best.status == "optimal" and early.bound <= best.objective <= early.objective
    assert early.status in ("feasible", "unknown", "optimal")
    assert seen and all(bound <= best.objective for _, bound, _, _ in seen)


def test_a_wanted_gap_is_kept():
    problem = transformer_problem(Transformer(24, 12288), KINDS, (8, 8, 24, 24))
    best, rough = solve_stages(problem), solve_stages(problem, gap=0.05)
    assert rough.bound <= best.objective * (1 + 1e-12) and rough.objective <= best.objective / 0.95


def test_an_interrupt_returns_the_best_so_far():
    problem = transformer_problem(Transformer(24, 12288), KINDS, (8, 8, 24, 24), noise=0.3)

    def interrupt(objective: float, *_: float) -> None:
        if np.isfinite(objective):
            raise KeyboardInterrupt

    found = solve_stages(problem, progress=interrupt)
    assert found.status == "feasible" and 0 < found.bound <= found.objective and found.stages


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time": np.ones((1, 2, 2))}, r"time must have shape \(choices, layers, layers \+ 1\)"),
        ({"time": np.full((1, 2, 3), -1.0)}, r"time\[0, 0, 0\] must be >= 0, got -1"),
        ({"fixed": np.full((1, 2, 3), np.nan)}, r"fixed\[0, 0, 0\] must be >= 0, got nan"),
        ({"transfer": np.zeros((3, 1, 1))}, r"transfer must have shape \(2, 1, 1\), got \(3, 1, 1\)"),
        ({"choices": ()}, "choices is empty"),
        ({"choices": (SubmeshChoice(1, 1),)}, r"choices\[0\] .* needs a kind in 0\.\.0"),
        ({"available": (-1,)}, "available must hold device counts >= 0"),
        ({"microbatches": 0}, "microbatches must be at least 1, got 0"),
        ({"max_stages": 0}, "max_stages must be at least 1, got 0"),
        ({"in_flight": (2, 1)}, "in_flight must be >= 0 and never decrease"),
    ],
)
def test_bad_problems_are_named(change: dict[str, object], message: str):
    good: dict[str, object] = {
        "choices": (SubmeshChoice(0, 1),),
        "available": (2,),
        "time": np.ones((1, 2, 3)),
    }
    with pytest.raises(StageProblemError, match=message):
        StageProblem(**(good | change))  # type: ignore[arg-type]


def test_bad_requests_are_named():
    problem = uniform(2, 2)
    for seconds in (0, -1, float("nan")):
        with pytest.raises(StageProblemError, match="seconds must be above 0"):
            solve_stages(problem, seconds=seconds)
    with pytest.raises(StageProblemError, match="runner_ups and gap"):
        solve_stages(problem, runner_ups=-1)
    with pytest.raises(StageProblemError, match="cover layers"):
        price(problem, [(0, 1, 0)])
    with pytest.raises(StageProblemError, match="take 3 devices of kind 0, but there are 2"):
        price(uniform(3, 2), [(0, 1, 0), (1, 2, 0), (2, 3, 0)])


def test_bench_rows_and_bad_limit():
    row = measure(Case(6, 16), 30)
    assert row.status == "optimal" and "TrainStep" in line(row)
    result = CliRunner().invoke(stage_bench_command, ["--seconds", "0"])
    assert result.exit_code == 2 and "must be above 0" in result.output
