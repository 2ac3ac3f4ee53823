"""Methods that prescribe layouts: Manual specs and their errors, Follow, CreateState."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

import autopar as ap
from autopar.core.errors import BadInput, PlanError
from autopar.sharding.explain import tokens

CLUSTER = ap.Cluster.parse("8xV100-16GB")
MESH = {"data": 2, "model": 4}
LINE = r"test_api_methods\.py:\d+"


def init(key: jax.Array) -> Any:
    up, down = jax.random.split(key)
    params = {
        "up": {"kernel": jax.random.normal(up, (64, 256)), "bias": jnp.zeros(256)},
        "down": {"kernel": jax.random.normal(down, (256, 64)), "bias": jnp.ones(64)},
    }
    return {"params": params, "momentum": jax.tree.map(jnp.zeros_like, params)}


def forward(params: Any, x: Any) -> Any:
    inner = checkpoint_name(jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"]), "hidden")
    return inner @ params["down"]["kernel"] + params["down"]["bias"]


def loss(params: Any, batch: Any) -> Any:
    return jnp.mean((forward(params, batch["x"]) - batch["y"]) ** 2)


def train(state: Any, batch: Any) -> Any:
    value, slope = ap.value_and_grad(loss)(state["params"], batch)
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["momentum"], slope)
    params = jax.tree.map(lambda w, m: w - 0.01 * m, state["params"], momentum)
    return {"params": params, "momentum": momentum}, value


def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=(16, 64)).astype(np.float32) for name in "xy"}


def manual(specs: Any, mesh: Any = MESH) -> Any:
    return ap.parallelize(train, method=ap.Manual(specs=specs, mesh=mesh), cluster=CLUSTER)


def path(value: Any) -> str:
    return "/".join(tokens(value.name))


def spec_of(plan: Any, name: str) -> Any:
    """The layout of the argument whose path ends so."""
    return next(plan.stages[0].sharding.layout[v] for v, value in plan.values if path(value).endswith(name))


def test_manual_specs_are_kept_and_the_rest_is_planned_around_them():
    specs = {"params/up/kernel": P(None, "model"), "batch/*": P("data"), "hidden": P("data", "model")}
    step = manual(specs)
    state, data = init(jax.random.key(0)), batch()
    plan = step.plan(state, data)
    assert plan.stages[0].mesh.names == ("data", "model")
    assert spec_of(plan, "params/up/kernel") == ((), ("model",))
    assert spec_of(plan, "batch/x") == (("data",), ())
    text = step.compile(state, data).hlo()["step"]
    assert "f32[8,64]" in text, "hidden [16, 256] is cut into 2 × 4"
    got, want = step(state, data), jax.jit(train)(state, data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), got, want)


def test_a_pattern_may_mean_several_tensors():
    plan = manual({"*/kernel": P(None, "model")}).plan(init(jax.random.key(0)), batch())
    for part in ("params", "momentum"):
        for name in ("up", "down"):
            assert spec_of(plan, f"{part}/{name}/kernel") == ((), ("model",))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"params/up/kernel": P("z")}, r"names the axis 'z', but the mesh has data \(2\), model \(4\)"),
        ({"params/up/kernel": P("data", "data")}, "uses the axis 'data' twice"),
        ({"params/up/bias": P(None, "data")}, "has 2 entries, but the tensor 1 dims"),
        ({"params/up/kernel": 3}, "expected a PartitionSpec, got 3"),
        ({"params/up/kernal": P("data")}, "did you mean .*up/kernel"),
        (
            {"params/up/kernel": P("data"), "up/kernel": P("model")},
            r"'params/up/kernel' says \[data, ·\] and 'up/kernel' says \[model, ·\] about state/params/up",
        ),
    ],
)
def test_a_bad_spec_names_the_users_line_and_the_remedy(specs: Any, message: str):
    with pytest.raises(BadInput, match=rf"Manual at {LINE}: .*{message}"):
        manual(specs).plan(init(jax.random.key(0)), batch())


def test_a_dim_that_cannot_be_cut_names_another():
    state = init(jax.random.key(0))
    state["params"]["up"]["kernel"] = state["momentum"]["up"]["kernel"] = np.zeros((63, 256), np.float32)
    data = {"x": np.zeros((16, 63), np.float32), "y": np.zeros((16, 64), np.float32)}
    with pytest.raises(
        BadInput, match=r"dim 0 of size 63 cannot be cut into 4 .* over model; cut dim 1 \(256\)"
    ):
        manual({"params/up/kernel": P("model")}).plan(state, data)


def test_layouts_that_one_operation_decides_cannot_differ():
    def named(x: Any) -> Any:
        a = checkpoint_name(jnp.tanh(x), "a")
        return checkpoint_name(a + 1.0, "b")

    method = ap.Manual(specs={"a": P("data"), "b": P("model")}, mesh=MESH)
    step = ap.parallelize(named, method=method, cluster=CLUSTER)
    with pytest.raises(PlanError, match=r"contradict each other.*one operation|cannot be kept"):
        step.plan(np.zeros((16, 16), np.float32))


def test_manual_takes_a_plan_or_specs():
    with pytest.raises(BadInput, match="and not both"):
        ap.Manual()


def trained(method: Any = None) -> Any:
    method = method or ap.Zero3(mesh=(8,))
    return ap.parallelize(train, method=method, cluster=CLUSTER)


def test_an_evaluation_step_follows_its_train_step():
    step, state, data = trained(), init(jax.random.key(0)), batch()
    follow = ap.parallelize(loss, method=ap.Follow(step))
    with pytest.raises(BadInput, match="call that step"):
        follow.plan(state["params"], data)
    state, _ = step(state, data)
    want = jax.jit(loss)(jax.tree.map(np.asarray, state["params"]), data)
    plan, theirs = follow.plan(state["params"], data), step.plan(state, data)
    for name in ("up/kernel", "down/kernel", "up/bias"):
        kept = spec_of(plan, f"params/{name}")
        assert kept == spec_of(theirs, f"params/{name}") and any(kept)
    np.testing.assert_allclose(follow(state["params"], data), want, rtol=1e-5)
    step(state, data)  # the state was not consumed


def test_a_state_is_created_where_its_step_keeps_it():
    step, data = trained(), batch()
    make = ap.parallelize(init, method=ap.CreateState(step))
    key = jax.random.key(3)
    step.plan(jax.eval_shape(init, key), data)
    state = make(key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state, jax.jit(init)(key))
    for x in jax.tree.leaves(state):
        assert x.addressable_shards[0].data.size * 8 == x.size, "every device holds its part"
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    (memory,) = make.compile(key).memory()
    assert memory.peak < whole / 2, "no device ever holds the state whole"
    got, want = step(state, data)[1], jax.jit(train)(jax.jit(init)(key), data)[1]
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_function_that_makes_no_state_is_refused():
    step, data = trained(), batch()
    step.plan(jax.eval_shape(init, jax.random.key(0)), data)
    make = ap.parallelize(lambda key: jax.random.normal(key, (3, 5)), method=ap.CreateState(step))
    with pytest.raises(BadInput, match="no result of this function"):
        make.plan(jax.random.key(0))


def test_following_takes_a_parallelized_step():
    with pytest.raises(BadInput, match=r"what autopar\.parallelize returned, got function"):
        ap.Follow(train)  # type: ignore[arg-type]
