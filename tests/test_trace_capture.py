"""Capture: a pytree function in, a graph and its equations out, which compute what the function does."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.experimental import io_callback

from autopar.core.errors import BadInput, MixedExamples, TraceError
from autopar.core.graph import Combine, OpKind, Phase
from autopar.trace.arguments import split_call
from autopar.trace.capture import capture
from autopar.trace.evaluate import run
from autopar.trace.traced import Traced


def arrays(tree: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype") or isinstance(x, int | float)]


def assert_same(traced: Traced, fun: Any, *args: Any, **kwargs: Any) -> None:
    """What the graph's equations compute equals what the function computes."""
    want = arrays(fun(*args, **kwargs))
    got = jax.jit(lambda *xs: run(traced, xs))(*arrays((args, kwargs)))
    assert len(got) == len(want)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(8, 3)
Y = np.linspace(0, 1, 16, dtype=np.float32).reshape(8, 2)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for _ in range(3):
            x = nn.relu(nn.Dense(5)(x))
        return nn.Dense(2)(x)


def test_linen_train_step() -> None:
    model = MLP()
    params = model.init(jax.random.key(0), X)

    def step(params: Any, batch: Any) -> Any:
        x, y = batch
        loss, g = jax.value_and_grad(lambda p: jnp.mean((model.apply(p, x) - y) ** 2))(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, g), loss

    traced = capture(step, (params, (X, Y)))
    assert_same(traced, step, params, (X, Y))
    assert traced.graph.layers == ("Dense_0", "Dense_1", "Dense_2", "Dense_3")
    assert traced.graph.aliases == tuple((i, i) for i in range(8))
    assert [leaf.path for leaf in traced.leaves if leaf.batch] == ["batch[0]", "batch[1]"]
    assert traced.leaves[0].path == "params['params']['Dense_0']['bias']"
    assert {e.phase for e in traced.graph.equations} == set(Phase)
    assert any(e.source.startswith("test_trace_capture.py:") for e in traced.graph.equations)


def test_shapes_are_enough_and_give_the_same_graph() -> None:
    def f(p: Any, x: Any) -> Any:
        return jnp.tanh(x @ p["w"]) + p["b"]

    p = {"w": np.ones((3, 4), np.float32), "b": np.zeros(4, np.float32)}
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (p, X))
    a, b = capture(f, (p, X)), capture(f, shapes)
    assert a.graph == b.graph and a.fingerprint == b.fingerprint
    assert_same(b, f, p, X)


def test_nnx_module_as_an_argument() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def f(model: nnx.Linear, x: Any) -> Any:
        return model(x).sum(0)

    assert_same(capture(f, (model, X)), f, model, X)


def test_nnx_split_state_is_state() -> None:
    graphdef, state = nnx.split(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))

    def step(state: Any, x: Any) -> Any:
        loss, g = jax.value_and_grad(lambda s: (nnx.merge(graphdef, s)(x) ** 2).mean())(state)
        return jax.tree.map(lambda p, g: p - g, state, g), loss

    traced = capture(step, (state, X))
    assert_same(traced, step, state, X)
    assert traced.graph.aliases == ((0, 0), (1, 1))


def test_nnx_update_in_place_is_refused() -> None:
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def step(model: nnx.Linear, x: Any) -> Any:
        model.bias[...] = model.bias[...] + x.sum()
        return x

    with pytest.raises(TraceError, match=r"_capture.py:\d+: it changes model.* in place.*nnx.split"):
        capture(step, (model, X))


def test_nnx_optimizer_that_updates_a_merged_module_and_returns_its_state() -> None:
    both = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split((both, nnx.Optimizer(both, optax.adam(0.1), wrt=nnx.Param)))

    def step(state: Any, x: Any) -> Any:
        model, optimizer = nnx.merge(graphdef, state)
        loss, g = nnx.value_and_grad(lambda model: (model(x) ** 2).mean())(model)
        optimizer.update(model, g)
        return nnx.state((model, optimizer)), loss

    traced = capture(step, (state, X))
    assert len(traced.graph.aliases) == len(jax.tree.leaves(state))
    changed, loss = jax.jit(step)(state, X)
    assert_same(traced, lambda *_: (changed, loss), state, X)


class Layered(eqx.Module):
    first: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    activation: Any

    def __call__(self, x: Any) -> Any:
        return self.dropout(self.activation(jax.vmap(self.first)(x)))


def test_equinox_module_with_static_leaves() -> None:
    model = Layered(
        eqx.nn.Linear(3, 2, key=jax.random.key(0)), eqx.nn.Dropout(0.5, inference=True), jax.nn.gelu
    )

    def step(model: Layered, x: Any) -> Any:
        g = eqx.filter_grad(lambda m: (m(x) ** 2).mean())(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -g, g))

    traced = capture(step, (model, X))
    assert len(traced.leaves) == 3 and len(traced.statics) == 3  # weight, bias, x; rate, inference, gelu
    assert len(traced.graph.aliases) == 2
    got = jax.jit(lambda *xs: run(traced, xs))(model.first.weight, model.first.bias, X)
    want = step(model, X)
    np.testing.assert_allclose(got[0], want.first.weight, rtol=1e-5)
    assert traced.out_tree == jax.tree.structure(want)


def test_keywords_and_static_arguments() -> None:
    def f(x: Any, power: int, *, scale: Any, how: str = "sum") -> Any:
        if power > 2:
            x = x**power
        return getattr(jnp, how)(x) * scale

    traced = capture(f, (X, 3), {"scale": 2.0, "how": "mean"}, static_argnums=(1,), static_argnames=("how",))
    assert [leaf.path for leaf in traced.leaves] == ["x", "scale"]
    np.testing.assert_allclose(run(traced, [X, 2.0])[0], f(X, 3, scale=2.0, how="mean"), rtol=1e-5, atol=1e-6)
    assert traced.in_tree == jax.tree.structure(((X, None), {"scale": 2.0}))


def test_static_arguments_that_do_not_exist() -> None:
    def f(x: Any, n: int) -> Any:
        return x * n

    with pytest.raises(BadInput, match="f takes 2 positional arguments, there is no 2"):
        split_call(f, (X, 1), {}, static_argnums=(2,))
    with pytest.raises(BadInput, match="f has no argument 'm'; it has x, n"):
        split_call(f, (X, 1), {}, static_argnames=("m",))
    assert split_call(f, (X, 1), {}, static_argnums=(-1,)).static_args == {1: 1}


def test_captured_arrays_are_constants() -> None:
    table = jnp.arange(12.0).reshape(4, 3)
    traced = capture(lambda x: x @ table.T + table[0, 0], (X,))
    assert [traced.graph.values[v].shape for v in traced.graph.constants] == [(4, 3)]
    assert_same(traced, lambda x: x @ table.T + table[0, 0], X)


def test_results_that_are_arguments_or_literals() -> None:
    def f(x: Any) -> Any:
        return x, 3, {"a": x.sum()}

    traced = capture(f, (X,))
    assert traced.graph.outputs[0] == traced.graph.inputs[0]
    got = run(traced, [X])
    assert int(got[1]) == 3 and traced.out_leaves[1].values == ()


def test_scan_has_a_body() -> None:
    def f(w: Any, x: Any) -> Any:
        def body(c: Any, w: Any) -> Any:
            return jnp.tanh(c @ w), c.sum()

        return lax.scan(body, x, w)

    w = np.ones((4, 3, 3), np.float32)
    traced = capture(f, (w, X), layer_scans=False)
    (loop,) = [e for e in traced.graph.equations if e.kind is OpKind.LOOP]
    assert (
        loop.loop is not None and loop.loop.length == 4 and loop.loop.consts == 0 and loop.loop.carries == 1
    )
    assert [e.op for e in loop.loop.body.equations] == ["dot_general", "tanh", "reduce_sum"]
    assert loop.flops == 4 * sum(e.flops for e in loop.loop.body.equations)
    assert_same(traced, f, w, X)


def test_a_scan_over_layers_is_cut_with_its_stacked_parameters() -> None:
    def step(w: Any, batch: Any) -> Any:
        def loss(w: Any) -> Any:
            h, _ = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), batch, w)
            return (h**2).mean()

        value, g = jax.value_and_grad(loss)(w)
        return w - 0.1 * g, value

    w = np.linspace(-1, 1, 36, dtype=np.float32).reshape(4, 3, 3)
    traced = capture(step, (w, X), layer_scans=(1, 3))
    weights = traced.leaves[0]
    assert [traced.graph.values[v].shape for v in weights.values] == [(1, 3, 3), (3, 3, 3)]
    assert [traced.graph.values[v].name for v in weights.values] == ["w piece 0", "w piece 1"]
    assert traced.graph.aliases == ((0, 0), (1, 1)) and traced.out_leaves[0].shape == (4, 3, 3)
    assert len(traced.graph.layers) == 2
    *pieces, value = jax.jit(lambda *xs: run(traced, xs))(w[:1], w[1:], X)
    want, loss = step(w, X)
    np.testing.assert_allclose(np.concatenate(pieces), want, rtol=1e-5)
    np.testing.assert_allclose(value, loss, rtol=1e-5)


def test_one_lone_array_is_state_only_when_it_comes_first() -> None:
    def step(w: Any, rate: Any, x: Any) -> Any:
        return w - rate * x.sum(), x.sum()

    traced = capture(step, (np.ones((4, 4), np.float32), np.float32(1), np.ones((4, 4), np.float32)))
    assert traced.graph.aliases == ((0, 0),)
    assert capture(lambda x: x * 2, (X,)).graph.aliases == ()


def test_each_part_of_the_result_is_the_next_value_of_one_argument() -> None:
    def step(params: Any, moments: Any, x: Any) -> Any:
        moments = jax.tree.map(lambda m: 0.9 * m + x.sum(), moments)
        return jax.tree.map(jnp.subtract, params, moments), moments

    tree = {"a": np.ones((3, 3), np.float32), "b": np.ones(3, np.float32)}
    assert capture(step, (tree, tree, X)).graph.aliases == ((0, 0), (1, 1), (2, 2), (3, 3))


def test_keys_and_scalars_are_not_cut() -> None:
    def f(key: Any, raw: Any, n: Any, x: Any) -> Any:
        return jax.random.normal(key, (2,)).sum() + raw[0] + n + x.sum()

    traced = capture(f, (jax.random.key(0), jax.random.PRNGKey(1), 3, X), batch_argnums=(0, 1, 2, 3))
    assert [leaf.path for leaf in traced.leaves if leaf.batch] == ["x"]


# ---------------------------------------------------------------- micro-batches


def mean_step(w: Any, batch: Any) -> Any:
    loss, g = jax.value_and_grad(lambda w: jnp.mean((batch["x"] @ w - batch["y"]) ** 2))(w)
    return w - 0.1 * g, loss, batch["x"] @ w


def test_microbatches_have_their_own_shapes() -> None:
    w, batch = np.ones((3, 2), np.float32), {"x": X, "y": Y}
    traced = capture(mean_step, (w, batch), microbatches=4)
    graph = traced.graph
    assert graph.microbatches == 4 and [graph.values[v].shape for v in graph.batch] == [(2, 3), (2, 2)]
    assert [leaf.shape for leaf in traced.leaves] == [(3, 2), (8, 3), (8, 2)]
    assert [leaf.shape for leaf in traced.out_leaves] == [(3, 2), (), (8, 2)]
    how = dict(graph.combine)
    assert how[graph.outputs[1]] is Combine.MEAN and how[graph.outputs[2]] is Combine.CONCAT


def test_a_batch_that_is_not_divisible() -> None:
    with pytest.raises(BadInput, match=r"batch\['x'\] has 8 examples, which 3 micro-batches do not divide"):
        capture(mean_step, (np.ones((3, 2), np.float32), {"x": X, "y": Y}), microbatches=3)


def test_no_batch_to_cut() -> None:
    with pytest.raises(BadInput, match="no argument was recognised as the batch"):
        capture(lambda x, y: x.sum() + y, (np.ones(2, np.float32), 1.0), microbatches=4)
    with pytest.raises(BadInput, match="there are 1 positional arguments, no number 1"):
        capture(jnp.sum, (X,), batch_argnums=(1,))


def test_mixed_examples_are_refused() -> None:
    def step(w: Any, x: Any) -> Any:
        g = jax.grad(lambda w: jnp.mean((x @ w - jnp.mean(x @ w, 0)) ** 3))(w)
        return w - g

    with pytest.raises(MixedExamples, match=r"test_trace_capture.py:\d+"):
        capture(step, (np.ones((3, 2), np.float32), X), microbatches=2)


# ---------------------------------------------------------------- errors


def here() -> int:
    return sys._getframe(1).f_lineno


def branch(x: Any) -> Any:
    if x.sum() > 0:
        return x
    return -x


def item(x: Any) -> Any:
    return x * float(x.sum())


def mask(x: Any) -> Any:
    return x[x > 0]


def loop(x: Any) -> Any:
    return sum(x for _ in range(x.sum().astype(int)))


def numpy_function(x: Any) -> Any:
    return np.sin(np.asarray(x))


@pytest.mark.parametrize(
    ("fun", "offset", "words"),
    [
        (branch, 1, "Python branches .*jax.lax.cond"),
        (item, 1, "a Python number is wanted"),
        (mask, 1, "indexed by a mask"),
        (loop, 1, "a Python integer is wanted .*static_argnums"),
        (numpy_function, 1, "numpy function .*jax.numpy"),
    ],
)
def test_values_wanted_while_tracing(fun: Any, offset: int, words: str) -> None:
    line = fun.__code__.co_firstlineno + offset
    with pytest.raises(TraceError, match=rf"^test_trace_capture.py:{line}: .*{words}"):
        capture(fun, (X,))


def test_a_string_among_the_arguments() -> None:
    with pytest.raises(TraceError, match=r"batch\['name'\] of the function at .*got 'a' of type str"):
        capture(lambda batch: batch["x"], ({"x": X, "name": "a"},))


def test_side_effects() -> None:
    def writes(x: Any) -> Any:
        return io_callback(lambda x: x, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(TraceError, match=rf"capture.py:{here() - 2}: io_callback has a side effect"):
        capture(writes, (X,))

    def prints(x: Any) -> Any:
        jax.debug.print("{}", x.sum())
        return x + 1

    assert "debug" in " ".join(e.op for e in capture(prints, (X,)).graph.equations)


def test_changes_in_place() -> None:
    def f(batch: Any) -> Any:
        batch["x"] = batch["x"] + 1
        return batch["x"].sum()

    with pytest.raises(TraceError, match=r"it changes batch\['x'\] in place"):
        capture(f, ({"x": X},))

    def g(batch: Any) -> Any:
        return batch.pop("x")

    with pytest.raises(TraceError, match="it changes an argument's structure in place"):
        capture(g, ({"x": X},))


def test_a_function_that_fails_on_a_part_of_the_batch() -> None:
    def f(x: Any) -> Any:
        return (x * np.ones((8, 1))).mean()

    with pytest.raises(
        MixedExamples, match=r"_capture.py:\d+: it runs on the full batch.* TypeError.*micro_batches=1"
    ):
        capture(f, (X,), microbatches=2)


def test_the_functions_own_errors_pass_through() -> None:
    with pytest.raises(TypeError, match="dot_general"):
        capture(lambda x: x @ x, (X,))
    with pytest.raises(BadInput, match="at least 1 micro-batch"):
        capture(branch, (X,), microbatches=0)


# ---------------------------------------------------------------- fingerprints

_PRINT = """
import jax, jax.numpy as jnp
from autopar.trace.capture import capture
f = lambda w, x: jax.grad(lambda w: jax.nn.relu(jax.lax.map(lambda r: r @ w, x)).sum())(w)
print(capture(f, (jnp.ones((3, 2)), jnp.ones((8, 3)))).fingerprint)
"""


def test_the_fingerprint_is_the_same_in_another_process() -> None:
    made = subprocess.run([sys.executable, "-c", _PRINT], capture_output=True, text=True, check=True)

    def f(w: Any, x: Any) -> Any:
        return jax.grad(lambda w: jax.nn.relu(lax.map(lambda r: r @ w, x)).sum())(w)

    assert capture(f, (jnp.ones((3, 2)), jnp.ones((8, 3)))).fingerprint == made.stdout.strip()


def test_the_fingerprint_tells_steps_apart() -> None:
    prints = {
        capture(f, (x,)).fingerprint
        for f, x in [
            (lambda x: x + 1, X),
            (lambda x: x + 2, X),
            (lambda x: x * 1, X),
            (lambda x: x + 1, X[:4]),
            (lambda x: x.sum(0), X),
            (lambda x: x.sum(1), X),
        ]
    }
    assert len(prints) == 6
