"""The decorator and its plan: how it may be called, what it refuses in which words, what a plan can do."""

import functools
import json
import logging
import math
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import io_callback

import autopar as ap
from autopar.api import planning
from autopar.api.counts import candidates
from autopar.api.exact import Made
from autopar.core.errors import (
    AutoparError,
    BackendError,
    BadInput,
    ClusterError,
    DoesNotFit,
    MixedExamples,
    PlanError,
    StalePlan,
    TraceError,
    UnknownName,
)
from autopar.models import mlp
from tests.steps import CONFIGS, EIGHT, MIXED, alone, assert_equal, case, run

MLP = case("mlp")
ARGS = MLP.state, MLP.batches[0]
SPMD = ap.ShardParallel(mesh=(1, 8))
TWO = ap.Auto(stages=2, micro_batches=2, whole_nodes=True)
HALF = jax.tree.map(lambda x: x[:4], ARGS[1])


def parallel(step=MLP.step, cluster=EIGHT, method=SPMD, **options):
    return ap.parallelize(step, cluster=cluster, method=method, **options)


@functools.cache
def planned():
    """Returns a step of two stages, with its plan, made once for the tests that only look."""
    step = parallel(cluster=MIXED, method=TWO)
    return step, step.plan(*ARGS)


def loss_of(result):
    return float(result[1])


LOSS = loss_of(jax.jit(MLP.step)(*ARGS))
close = functools.partial(pytest.approx, rel=1e-5)


# -- calling


def test_as_a_decorator_with_and_without_options():
    @ap.parallelize(method=SPMD, cluster=EIGHT)
    def train(state, batch):
        """Words."""
        return MLP.step(state, batch)

    assert train.__name__ == "train" and train.__doc__ == "Words."
    assert loss_of(train(*ARGS)) == close(LOSS)
    assert isinstance(ap.parallelize(MLP.step).method, ap.Auto)


def test_shapes_are_enough_to_plan():
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), ARGS)
    assert parallel().plan(*shapes) == parallel().plan(*ARGS)


def test_keyword_arguments():
    step = parallel()
    assert loss_of(step(MLP.state, batch=ARGS[1])) == close(LOSS)
    assert loss_of(step(batch=ARGS[1], state=MLP.state)) == close(LOSS)
    assert loss_of(step(*ARGS)) == close(LOSS)


def test_static_arguments(caplog):
    def scaled(state, batch, mode, *, times=1):
        state, loss = MLP.step(state, batch)
        return state, loss * (10 if mode == "ten" else 1) * times

    step = parallel(scaled, static_argnums=2, static_argnames="times")
    assert loss_of(step(*ARGS, "ten")) == close(10 * LOSS)
    assert loss_of(step(*ARGS, "one", times=3)) == close(3 * LOSS)
    assert loss_of(step(*ARGS, "one", times=4)) == close(4 * LOSS)  # planned anew, not taken for times=3
    assert "planned and compiled again" in caplog.text
    exe = step.compile(*ARGS, "ten", times=2)
    assert loss_of(exe(*ARGS, "ten", times=2)) == close(20 * LOSS)
    with pytest.raises(BadInput, match=r"static argument times is 3, the step was traced for 2"):
        exe(*ARGS, "ten", times=3)
    with pytest.raises(BadInput, match=r"static argument 2 is 'one', the step was traced for 'ten'"):
        exe(*ARGS, "one", times=2)
    with pytest.raises(BadInput, match="static argument times is missing"):
        exe(*ARGS, "ten")
    with pytest.raises(BadInput, match="static argument 2 is a list, which has no hash"):
        step(*ARGS, ["ten"])


def test_other_shapes_are_planned_again_with_a_note(caplog):
    step = parallel()
    with caplog.at_level(logging.WARNING, logger="autopar"):
        assert loss_of(step(*ARGS)) == close(LOSS)
        assert not caplog.records
        assert loss_of(step(MLP.state, HALF)) == close(loss_of(MLP.step(MLP.state, HALF)))
        assert "step: arguments of other shapes" in caplog.text
        caplog.clear()
        assert loss_of(step(*ARGS)) == close(LOSS)
        assert not caplog.records, "both are kept"


def test_a_function_without_state_joins_its_micro_batches():
    forward = functools.partial(mlp.forward, CONFIGS["mlp"][1])
    x = ARGS[1]["inputs"]
    for cluster, method in (
        (MIXED, ap.Auto(stages=2, micro_batches=4, whole_nodes=True)),
        (EIGHT, ap.ShardParallel(mesh=(2, 4), micro_batches=2)),
    ):
        got = parallel(lambda p, x: forward(p, x), cluster, method)(MLP.state.params, x)
        assert got.shape == (8, 8)
        np.testing.assert_allclose(got, forward(MLP.state.params, x), rtol=1e-5, atol=1e-6)


def test_donation():
    kept, given = (jax.tree.map(jnp.copy, MLP.state) for _ in range(2))
    parallel()(kept, ARGS[1])
    assert not any(x.is_deleted() for x in jax.tree.leaves(kept))
    parallel(donate=True)(given, ARGS[1])
    np.testing.assert_array_equal(kept.step, 0)


def test_an_equal_method_on_an_equal_cluster_plans_nothing_anew():
    def step(state, batch):
        return MLP.step(state, batch)

    made = [parallel(step, cluster=replace(EIGHT), method=ap.ShardParallel(mesh=(1, 8))) for _ in range(2)]
    first, second = (each.plan(*ARGS) and each.made for each in made)
    assert first is second
    other = parallel(step, method=ap.ShardParallel(mesh=(8, 1)))
    assert other.plan(*ARGS) and other.made is not first
    smaller = parallel(step, cluster=replace(EIGHT, latency=2 * EIGHT.latency))
    assert smaller.plan(*ARGS) and smaller.made is not first


# -- compiled steps


def test_executable():
    step, plan = planned()
    exe = step.compile(*ARGS)
    names = {segment.name for segment in plan.segments}
    assert set(exe.hlo()) == names and all("HloModule" in text for text in exe.hlo().values())
    rows = exe.memory()
    assert len(rows) == 2
    for row, stage in zip(rows, plan.stages, strict=True):
        assert row.predicted == stage.memory.peak and row.limit == stage.mesh.device.memory
        assert row.arguments > 0 and row.peak >= row.arguments
    assert_equal(run(exe, MLP), alone("mlp"))
    exe.measure(*ARGS)
    assert len(exe.timeline().workers) == 2 and exe.timeline().step_time > 0


# -- plans


def test_a_plan_is_saved_loaded_run_simulated_and_drawn(tmp_path):
    _, plan = planned()
    plan.save(tmp_path / "plan.json")
    loaded = ap.Plan.load(tmp_path / "plan.json")
    assert loaded == plan and str(loaded) == str(plan)
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"], "no parts are left"
    assert_equal(run(parallel(cluster=MIXED, method=ap.Manual(loaded)), MLP), alone("mlp"))
    line = loaded.simulate()
    assert line.step_time == pytest.approx(plan.step_time) and plan.step_time > 0
    line.save(tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for name in ("plan.svg", "plan.png"):
        plan.picture(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    line.picture(tmp_path / "timeline.svg")
    assert "<svg" in (tmp_path / "timeline.svg").read_text()


def test_what_a_plan_says():
    _, plan = planned()
    assert {stage.mesh.device.name for stage in plan.stages} <= set(MIXED.kinds)
    assert 0 <= plan.gap < 0.01 and 0 <= plan.bubble < 1
    for word in ("2 stages", "2 micro-batches", "proven within", "memory per device"):
        assert word in str(plan)


def test_a_plan_edited_by_hand_runs():
    _, plan = planned()
    edited = ap.Plan.of(replace(plan, schedule="gpipe" if plan.schedule == "1f1b" else "1f1b"))
    assert_equal(run(parallel(cluster=MIXED, method=ap.Manual(edited)), MLP), alone("mlp"))


def test_plans_for_something_else_are_refused():
    _, plan = planned()
    other = case("gpt anonymous")
    step = parallel(other.step, MIXED, ap.Manual(plan))
    with pytest.raises(StalePlan, match="made for another model"):
        step.plan(other.state, other.batches[0])
    with pytest.raises(StalePlan, match="other shapes, layers or versions; plan again"):
        parallel(cluster=MIXED, method=ap.Manual(plan)).plan(MLP.state, HALF)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda data: b"garbage", PlanError, "is not a plan"),
        (lambda data: bytes(range(256)), PlanError, "is not a plan"),
        (lambda data: json.dumps(data)[:1000].encode(), PlanError, "is not a plan"),
        (lambda data: [1], PlanError, "JSON, but not a plan"),
        (lambda data: {"is": "Cluster"}, PlanError, "JSON, but not a plan"),
        (lambda data: data | {"version": 99}, StalePlan, "plan format 99, but 2 is needed"),
        (
            lambda data: {k: v for k, v in data.items() if k != "stages"},
            PlanError,
            "'stages', which is missing",
        ),
        (lambda data: data | {"stages": "none"}, PlanError, r"stages: expected a list"),
        (lambda data: data | {"microbatches": "2"}, PlanError, r"microbatches: expected int, got '2'"),
    ],
    ids=["text", "binary", "truncated", "a list", "another noun", "version", "missing", "stages", "count"],
)
def test_files_that_are_no_plan(tmp_path, change, error, words):
    path = tmp_path / "plan.json"
    planned()[1].save(path)
    changed = change(json.loads(path.read_text()))
    path.write_bytes(changed if isinstance(changed, bytes) else json.dumps(changed).encode())
    with pytest.raises(error, match=words) as caught:
        ap.Plan.load(path)
    assert str(path) in str(caught.value)


def test_a_plan_file_that_is_not_there(tmp_path):
    with pytest.raises(PlanError, match="cannot read plan"):
        ap.Plan.load(tmp_path / "none.json")


# -- what is refused


@pytest.mark.parametrize(
    ("cluster", "method", "args", "error", "words"),
    [
        (MIXED, replace(TWO, stages=7), ARGS, BadInput, "7 stages asked for, but the model has 3 layers"),
        ("2xT4", replace(TWO, stages=3), ARGS, BadInput, "3 stages asked for, but there are 2 devices"),
        (EIGHT, replace(SPMD, micro_batches=3), ARGS, BadInput, r"8 examples, which 3 micro-batches do not"),
        (MIXED, SPMD, ARGS, BadInput, "devices of one kind, but the cluster has A100-40GB, V100-16GB, T4"),
        (EIGHT, ap.ShardParallel(mesh=(3, 2)), ARGS, ClusterError, "3×2 is not the cluster's 8 devices"),
        (EIGHT, replace(TWO, schedule="zigzag"), ARGS, UnknownName, "zigzag"),
        (EIGHT, SPMD, (*ARGS, "train"), TraceError, r"expected an array or a number, got 'train' .*static"),
    ],
    ids=["layers", "devices", "batch", "kinds", "mesh", "schedule", "arguments"],
)
def test_arguments_that_do_not_suit(cluster, method, args, error, words):
    with pytest.raises(error, match=words):
        parallel(cluster=cluster, method=method).plan(*args)


@pytest.mark.parametrize("transformed", [jax.jit, jax.vmap, jax.grad], ids=["jit", "vmap", "grad"])
def test_a_parallelized_step_inside_of_what_jax_transforms(transformed):
    step = parallel(lambda x: (x[0] * 2).sum())
    words = r"was called inside jax.jit.* \(x\[0\] has no value there\).*call it from plain Python"
    for _ in range(2):
        with pytest.raises(TraceError, match=words):
            transformed(lambda x: step([x]))(jnp.ones(8))
        assert float(step([jnp.ones(8)])) == 16.0  # and so it does when it is compiled


def test_options_that_do_not_suit():
    with pytest.raises(BadInput, match="takes a function, got int"):
        ap.parallelize(3)
    with pytest.raises(BadInput, match=r"method must be an Auto, .* got 'auto'"):
        parallel(method="auto")
    with pytest.raises(BadInput, match="micro_batches must be a whole number of at least 1, got 0"):
        ap.Auto(micro_batches=0)
    with pytest.raises(UnknownName, match="V100"):
        parallel(cluster="8xV100x")
    with pytest.raises(BackendError, match="needs 16 devices, this process has 8"):
        parallel(cluster="16xV100-16GB", method=ap.ShardParallel(mesh=(2, 8))).compile(*ARGS)


leaked = []


def branching(state, batch):
    return MLP.step(state, batch) if batch["inputs"].sum() > 0 else (state, jnp.float32(0))


def calling_back(state, batch):
    io_callback(lambda x: None, None, batch["inputs"].sum())
    return MLP.step(state, batch)


def leaking(state, batch):
    leaked.append(batch["inputs"].sum())
    state, loss = MLP.step(state, batch)
    return state, loss + leaked[0]


def writing(state, batch):
    batch["inputs"] = batch["inputs"] * 2
    return MLP.step(state, batch)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (branching, "Python branches on a value .*; use jax.lax.cond or jnp.where"),
        (calling_back, "io_callback has a side effect .*; return the value and do it outside"),
        (leaking, "a value of one trace is used in another.*; return it as a result"),
        (writing, "changes .* in place; what is written there would be lost"),
        (lambda state, batch: (state, "done"), "expected an array or a number, got 'done'"),
    ],
    ids=["branch", "callback", "leak", "write", "result"],
)
def test_functions_that_are_not_pure(step, words):
    traced = parallel(step)
    with pytest.raises(TraceError, match=rf"test_api\.py:\d+.*{words}"):
        for batch in (ARGS[1], HALF):  # what a trace leaks is used by the next
            traced.plan(ARGS[0], batch)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_key_that_every_micro_batch_splits_alike(stages):
    """The next key is taken of one micro-batch; what the others make of it is read by nothing."""

    def step(state, x):
        weights, key = state
        key, own = jax.random.split(key)
        noise = jax.random.normal(own, x.shape)

        def loss(weights):
            return ((jnp.tanh((x + noise) @ weights[0]) @ weights[1]) ** 2).mean()

        value, grads = ap.value_and_grad(loss)(weights)
        return (jax.tree.map(lambda w, g: w - g, weights, grads), key), value

    weights = tuple(0.1 * jax.random.normal(jax.random.key(k), (16, 16)) for k in range(2))
    state, x = (weights, jax.random.key(3)), jax.random.normal(jax.random.key(4), (8, 16))
    (expected, key), loss = jax.jit(step)(state, x)
    method = ap.Auto(stages=stages, micro_batches=2)
    (found, next_key), value = parallel(step, method=method)(state, x)
    assert loss == close(float(value))
    assert (jax.random.key_data(key) == jax.random.key_data(next_key)).all()
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), expected, found)


@pytest.mark.parametrize(
    ("batch", "counts"), [(64, [1, 2, 4, 8, 16, 32, 64]), (63, [1, 3, 7, 21, 63]), (7, [1, 7]), (1, [1])]
)
def test_numbers_of_micro_batches_that_are_tried(batch, counts):
    """Every one divides the batch; where nothing fits, all greater ones are tried."""
    found = {}
    for micro in candidates(batch, 1, found):
        found[micro] = DoesNotFit("too big")
    assert list(found) == counts


@pytest.mark.parametrize(
    ("bubble", "tight", "again", "recomputes"),
    [(0.4, True, 0.9, True), (0.4, True, 1.1, False), (0.1, True, 0.9, False), (0.4, False, 0.9, False)],
    ids=["faster", "slower", "busy", "roomy"],
)
def test_where_memory_makes_devices_wait_recomputing_is_tried(monkeypatch, bubble, tight, again, recomputes):
    _, plan = planned()
    memory = replace(plan.stages[0].sharding.memory, limit=1 if tight else 1 << 60)
    stage = plan.stages[0]
    stages = (replace(stage, sharding=replace(stage.sharding, memory=memory)),)
    kept = Made(replace(plan, stages=stages, bubble=bubble, step_time=1.0, notes=()), None)
    other = Made(replace(kept.plan, step_time=again), None)
    monkeypatch.setattr(planning, "_fitting", lambda *_: kept)
    monkeypatch.setattr(planning, "_pipeline", lambda *_: other)
    tracer = SimpleNamespace(prepared=lambda micro: SimpleNamespace(differentiates=True))
    found = planning.make(tracer, EIGHT, ap.Auto(micro_batches=2), print)
    assert found.plan.step_time == (again if recomputes else 1.0)
    assert any("a step takes 1000 ms" in note for note in found.plan.notes) == recomputes


def test_gradients_per_example_are_planned_in_one_micro_batch():
    """Clipped one by one (DP-SGD), they are no gradient of a micro-batch: two cannot be planned, one can."""

    def step(w, x):
        gradients = jax.vmap(jax.grad(lambda w, x: jnp.tanh(x @ w).sum()), (None, 0))(w, x)
        norms = jnp.sqrt((gradients**2).sum((1, 2)))
        return w - (gradients / norms[:, None, None]).mean(0), norms.mean()

    w, x = jax.random.normal(jax.random.key(0), (16, 8)), jax.random.normal(jax.random.key(1), (8, 16))
    auto = parallel(step, method=ap.Auto())
    assert auto.plan(w, x).microbatches == 1
    np.testing.assert_allclose(auto(w, x)[0], jax.jit(step)(w, x)[0], rtol=1e-5, atol=1e-6)


def test_a_step_that_mixes_examples_is_refused_in_micro_batches():
    def step(params, x):
        return jax.tree.map(lambda p: p - (x / x.max()).mean(), params), x.std()

    method = ap.ShardParallel(mesh=(1, 8), micro_batches=2)
    with pytest.raises(MixedExamples, match=r"test_api\.py:\d+"):
        parallel(step, method=method).plan(MLP.state.params, ARGS[1]["inputs"])


def with_devices(cluster, **changes):
    nodes = tuple(replace(n, device=replace(n.device, **changes)) for n in cluster.nodes)
    return replace(cluster, nodes=nodes)


def test_what_does_not_fit_says_how_much_is_missing():
    cases = ((EIGHT, SPMD), (MIXED, TWO), (MIXED, ap.Auto()))
    for cluster, method in cases:
        with pytest.raises(DoesNotFit, match=r"KiB.*; add devices, use more micro-batches") as caught:
            parallel(cluster=with_devices(cluster, memory=2000), method=method).plan(*ARGS)
        assert caught.value.missing and 0 < caught.value.missing < 20_000


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_costs_that_are_no_numbers(bad):
    with pytest.raises(BadInput, match="V100-16GB: bandwidth must be a positive finite number"):
        with_devices(EIGHT, bandwidth=bad)
    with pytest.raises(BadInput, match="float32 must be a positive finite number"):
        with_devices(EIGHT, flops=(("float32", bad),))
    with pytest.raises(ClusterError, match="bandwidths must be positive and finite"):
        replace(MIXED, network=bad)


def test_costs_that_overflow_are_planned_or_refused_in_words():
    for rate in (1e-300, 5e-324):
        slow = with_devices(EIGHT, flops=(("float32", rate),))
        try:
            plan = parallel(cluster=slow).plan(*ARGS)
            assert plan.step_time > 0
        except AutoparError as error:
            assert "finite" in str(error)
