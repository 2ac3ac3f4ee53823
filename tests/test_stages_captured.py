"""assign and cut on graphs captured from real steps: named layers, layers by cost, dropout, bfloat16."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest

from autopar.core.graph import Graph, Phase
from autopar.models import families, gpt, mlp, step
from autopar.stages import assign, cut, holders
from autopar.stages.problem import boundary_bytes
from autopar.trace.capture import capture
from autopar.trace.grad_equation import value_and_grad


@cache
def captured(name: str, value_and_grad) -> Graph:
    model, config = CASES[name]
    optimizer = step.adamw()
    train = step.train_step(partial(model.loss, config), optimizer, value_and_grad)
    dropout = getattr(config, "dropout", 0.0) > 0
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(lambda k: step.init_state(partial(model.init, config), optimizer, k, dropout), key)
    sequence = None if model is mlp else 16
    make = families._vector_batch if model is mlp else families._token_batch
    batch = jax.eval_shape(lambda k: make(config, k, batch=4, sequence=sequence), key)
    return capture(train, (state, batch), assign=assign).graph


def anonymous(graph: Graph) -> Graph:
    bare = tuple(replace(e, layer=None) for e in graph.equations)
    return assign(replace(graph, layers=(), equations=bare))


def evaluate(graph: Graph, equations, env: dict[int, int]) -> None:
    for i in equations:
        e = graph.equations[i]
        read = tuple(None if v is None else env[v] for v in e.inputs)
        env.update((v, hash((e.op, str(e.flops), read, k))) for k, v in enumerate(e.outputs))


def check(graph: Graph, segments) -> None:
    """The segments in order, each with its declared inputs only, compute the graph's results (as hashes)."""
    start = {v: hash(("input", v)) for v in (*graph.inputs, *graph.constants)}
    whole, held, made = dict(start), holders(graph, segments), {}
    evaluate(graph, range(len(graph.equations)), whole)
    for segment in segments:
        assert all(v in made or segment.stage in held[v] for v in segment.inputs), segment.name
        local = {v: made.get(v, start.get(v)) for v in segment.inputs}
        evaluate(graph, segment.equations, local)
        made.update((v, local[v]) for v in segment.outputs)
    assert all(v is None or made.get(v, start.get(v)) == whole[v] for v in graph.outputs)
    assert {i for s in segments for i in s.equations} == set(range(len(graph.equations)))


GPT = gpt.GPTConfig(vocabulary=64, positions=16, layers=3, hidden=16, heads=2)
CASES = {
    "gpt": (gpt, GPT),
    "gpt with dropout": (gpt, replace(GPT, dropout=0.1)),
    "gpt in bfloat16": (gpt, replace(GPT, dtype=jnp.bfloat16)),
    "mlp": (mlp, mlp.MLPConfig(layers=6)),
}


@pytest.mark.parametrize("complete", [assign, anonymous], ids=["named", "by cost"])
@pytest.mark.parametrize("name", CASES)
def test_plain_gradients(name: str, complete):
    check_three_stages(complete(captured(name, jax.value_and_grad)), name)


@pytest.mark.parametrize("name", CASES)
def test_layer_by_layer_gradients(name: str):
    check_three_stages(captured(name, value_and_grad), name)


def check_three_stages(graph: Graph, name: str) -> None:
    layers = len(graph.layers)
    assert layers >= 3
    segments = cut(graph, tuple(3 * k // layers for k in range(layers)))
    check(graph, segments)
    micro = [s.name for s in segments if s.phase is not Phase.APPLY]
    assert micro == ["forward_0", "forward_1", "forward_2", "backward_2", "backward_1", "backward_0"]
    assert {s.level for s in segments if s.phase is Phase.APPLY} == {0, 1, 2}
    shared = {
        graph.values[v].name: on
        for v, on in holders(graph, segments).items()
        if len(on) > 1 and v not in graph.batch and graph.values[v].size > 2
    }
    tied = {"state.params['embedding']['embedding']": (0, 2)}
    assert shared == (tied if name.startswith("gpt") else {})
    for v, on in holders(graph, segments).items():
        moments = [w for w in graph.inputs if graph.values[w].name.endswith(graph.values[v].name[5:])]
        if ".params" in graph.values[v].name:
            assert {holders(graph, segments)[w] for w in moments if w != v} <= {on[:1]}


def test_only_activations_cross_between_blocks():
    forward, backward = boundary_bytes(captured("gpt", jax.value_and_grad))
    activations = 4 * 16 * 16 * 4
    assert list(forward) == list(backward) == [0, activations, activations]
