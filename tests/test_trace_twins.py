"""Equal layers share a derivative: the graph is what it would be without, down to names and lines."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autopar.models import catalog
from autopar.stages import assign
from autopar.trace import twins
from autopar.trace.capture import capture
from autopar.trace.evaluate import run
from autopar.trace.gradient import value_and_grad


def traced_apart(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(twins, "twin_key", lambda *_: None)
        return capture(*args, **options)


@pytest.mark.parametrize(
    "name, sizes, remat",
    [
        ("gpt-tiny", {"layers": 4}, False),
        ("gpt-tiny", {"layers": 4}, True),
        ("wresnet-tiny", {"blocks": (4,)}, False),
    ],
)
def test_graphs_are_the_same_as_without_sharing(name, sizes, remat, monkeypatch):
    model = catalog.get(name, value_and_grad=value_and_grad, **sizes)
    calls: list[Any] = []
    traced_apart(
        monkeypatch, model.step, model.args, assign=assign, remat=remat
    )  # JAX keeps lines of first calls
    apart = traced_apart(monkeypatch, model.step, model.args, assign=assign, remat=remat)
    real = twins.differentiate_layer
    monkeypatch.setattr(twins, "differentiate_layer", lambda *a: calls.append(a) or real(*a))
    shared = capture(model.step, model.args, assign=assign, remat=remat)
    assert len(calls) < len(shared.graph.layers)
    assert shared.graph == apart.graph and shared.fingerprint == apart.fingerprint
    names = [[str(e.source_info.name_stack) for e in t.equations] for t in (shared, apart)]
    assert names[0] == names[1]


def layered(*layers: Any) -> Any:
    def loss(weights: Any, x: Any) -> Any:
        for k, (layer, w) in enumerate(zip(layers, weights, strict=True)):
            with jax.named_scope(f"layer_{k}"):
                x = layer(x @ w)
        return jnp.mean(x)

    return lambda weights, x: value_and_grad(loss)(weights, x), jax.value_and_grad(loss)


def with_rule(scale: float) -> Any:
    """A function whose own derivative is off by a factor, so that it matters which rule is used."""

    @jax.custom_jvp
    def act(x: Any) -> Any:
        return jnp.tanh(x)

    act.defjvp(lambda xs, ts: (jnp.tanh(xs[0]), scale * ts[0]))
    return act


def powered(n: float) -> Any:
    return lambda x: x * n


@pytest.mark.parametrize(
    "layers, distinct",
    [
        ([with_rule(2.0) for _ in range(4)], 3),  # the first takes no cotangent on, the last makes the loss
        ([with_rule(k) for k in (1.0, 2.0, 3.0, 4.0)], 4),
        ([powered(n) for n in (2.0, 3.0, 3.0, 0.0, -0.0, 2.0)], 5),
        ([jax.nn.relu] * 3 + [jax.nn.gelu] * 3, 4),
    ],
    ids=["equal rules", "other rules", "other numbers", "functions of jax.nn"],
)
def test_only_equal_layers_share(layers, distinct, monkeypatch):
    ours, plain = layered(*layers)
    weights = [jax.random.normal(jax.random.key(k), (8, 8)) for k in range(len(layers))]
    x = jnp.ones((4, 8))
    calls: list[Any] = []
    real = twins.differentiate_layer
    monkeypatch.setattr(twins, "differentiate_layer", lambda *a: calls.append(a) or real(*a))
    traced = capture(ours, (weights, x), assign=assign)
    assert len(calls) == distinct
    want = jax.tree.leaves(plain(weights, x))
    for a, b in zip(run(traced, [*weights, x]), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
