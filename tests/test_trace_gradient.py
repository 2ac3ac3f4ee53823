"""value_and_grad as an equation, and its differentiation by layers, against jax.value_and_grad."""

import re
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src import source_info_util
from jax.extend.core import Literal

from autopar.core.graph import Equation, Graph, Phase, Remat, Value
from autopar.models import gpt
from autopar.trace.capture import begin, capture, split
from autopar.trace.flat import dce, flatten, run
from autopar.trace.grad_equation import GRAD
from autopar.trace.gradient import differentiate, grad, gradient_equations, value_and_grad


def build(flat):
    """Returns a graph without rules, its layers taken from names like "Block_2"."""
    number = {v: i for i, v in enumerate([*flat.inputs, *(c for c, _ in flat.constants)])}
    values = [Value(v.aval.shape, str(v.aval.dtype)) for v in number]
    equations, names = [], []
    for e, mark in zip(flat.equations, flat.marks):
        reads = tuple(None if isinstance(a, Literal) else number[a] for a in e.invars)
        for v in e.outvars:
            number[v] = len(values)
            values.append(Value(v.aval.shape, str(v.aval.dtype)))
        found = re.search(r"(Block|Layer)_\d+", str(e.source_info.name_stack))
        names.append(mark.layer or (found.group() if found else None))
        equations.append(Equation(e.primitive.name, reads, tuple(number[v] for v in e.outvars)))
    layers = tuple(dict.fromkeys(n for n in names if n))
    equations = [replace(e, layer=layers.index(n) if n else None) for e, n in zip(equations, names)]
    outputs = tuple(None if isinstance(a, Literal) else number[a] for a in flat.outputs)
    graph = Graph(tuple(values), tuple(equations), tuple(number[v] for v in flat.inputs), outputs, layers)
    return replace(graph, constants=tuple(number[c] for c, _ in flat.constants))


def by_name(graph):
    """Returns the graph with equations that have no name given to the latest layer they read from."""
    layer = [e.layer for e in graph.equations]
    made = graph.producers()
    for i, e in enumerate(graph.equations):
        above = [layer[made[v]] for v in e.operands if v in made and layer[made[v]] is not None]
        if layer[i] is None and above:
            layer[i] = max(above)
    return replace(graph, equations=tuple(replace(e, layer=k) for e, k in zip(graph.equations, layer)))


FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiles in a fraction of the time; what is compared runs once."""


def taken_apart(step, *args, remat=False, assign=by_name):
    """Returns the differentiated step as a Flat, after comparing what it computes with `step` itself."""
    flat = dce(flatten(jax.make_jaxpr(step)(*args)))
    assert gradient_equations(flat)
    apart = differentiate(flat, assign, build, remat)
    apart.check()
    assert not gradient_equations(apart)
    got = jax.jit(lambda *x: run(apart, x), compiler_options=FAST)(*jax.tree.leaves(args))
    want = jax.tree.leaves(jax.jit(step, compiler_options=FAST)(*args))
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-6)
    return apart


def layers_of(flat, phase):
    return list(dict.fromkeys(m.layer for m in flat.marks if m.phase is phase and m.layer))


def crossing(flat):
    """Returns (from, to, variable) for each value that a layer reads from another one."""
    made = {v: (m.layer, m.phase) for e, m in zip(flat.equations, flat.marks) for v in e.outvars}
    found = set()
    for e, m in zip(flat.equations, flat.marks):
        for a in e.invars:
            if (
                not isinstance(a, Literal)
                and a in made
                and None not in (made[a][0], m.layer)
                and made[a][0] != m.layer
            ):
                found.add((made[a], (m.layer, m.phase), a))
    return found


# ---------------------------------------------------------------- the equation


def tanh_loss(p, x, *, scale=1.0, tag="a"):
    return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]) ** 2) * scale, {"mean": x.mean(), "tag": tag}


WEIGHTS = {"w": jnp.arange(9.0).reshape(3, 3) / 9, "b": jnp.ones(3)}
INPUT = jnp.arange(6.0).reshape(2, 3) / 6


def same(x, y):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6) if a is not b else None, x, y
    )


def test_eager_is_jax():
    same(
        value_and_grad(tanh_loss, has_aux=True)(WEIGHTS, INPUT, tag="b"),
        jax.value_and_grad(tanh_loss, has_aux=True)(WEIGHTS, INPUT, tag="b"),
    )
    branching = lambda x: x**2 if x > 1 else -x  # noqa: E731  Python branching works on concrete values
    assert grad(branching)(3.0) == 6.0


@pytest.mark.parametrize("argnums", [0, 1, -1, (0,), (1, 0)])
def test_argnums_and_aux_under_jit(argnums):
    def both(vg):
        def step(p, x):
            (loss, aux), g = vg(tanh_loss, argnums, has_aux=True)(p, x, scale=2.0, tag="b")
            assert aux.pop("tag") == "b"
            return loss, aux, g

        return step

    same(jax.jit(both(value_and_grad))(WEIGHTS, INPUT), jax.jit(both(jax.value_and_grad))(WEIGHTS, INPUT))
    jaxpr = jax.make_jaxpr(both(value_and_grad))(WEIGHTS, INPUT)
    assert [e.primitive for e in jaxpr.jaxpr.eqns] == [GRAD]


def test_grad_with_aux():
    step = lambda vg: lambda p: vg(lambda p: (p["w"].sum() ** 2, p["b"]), has_aux=True)(p)  # noqa: E731
    same(jax.jit(step(grad))(WEIGHTS), step(jax.grad)(WEIGHTS))


def test_batching_and_differentiation_of_the_equation():
    loss = lambda p, x: tanh_loss(p, x)[0]  # noqa: E731
    ours, theirs = jax.jit(lambda p, x: grad(loss)(p, x)), jax.grad(loss)
    xs = jnp.stack([INPUT, INPUT + 1])
    same(jax.vmap(ours, (None, 0))(WEIGHTS, xs), jax.vmap(theirs, (None, 0))(WEIGHTS, xs))
    norm = lambda g: lambda p: sum(jnp.vdot(t, t) for t in jax.tree.leaves(g(p, INPUT)))  # noqa: E731
    same(jax.grad(norm(ours))(WEIGHTS), jax.grad(norm(theirs))(WEIGHTS))


@pytest.mark.parametrize("option", ["holomorphic", "allow_int"])
def test_unoffered_options_name_jax(option):
    with pytest.raises(NotImplementedError, match=r"jax\.grad"):
        grad(tanh_loss, **{option: True})


@pytest.mark.parametrize(
    "fun, x, what",
    [
        (lambda x: x, INPUT, "scalar-output"),
        (lambda x: x.sum(), jnp.arange(3), "real- or complex-valued inputs"),
        (lambda x: x.astype(int).sum(), INPUT, "real-valued outputs"),
    ],
)
def test_errors_are_those_of_jax(fun, x, what):
    with pytest.raises(TypeError, match=what):
        jax.jit(grad(fun))(x)


# ---------------------------------------------------------------- layers


def mlp(p, x, depth, skip=False):
    first = None
    for i in range(depth):
        with jax.named_scope(f"Layer_{i}"):
            x = jax.nn.relu(x @ p[i]["w"] + p[i]["b"]) + x
            first = x if first is None else first
            if skip and i == depth - 1:
                x = x * jnp.tanh(first)
    return x


def mlp_parameters(depth, width=8):
    keys = jax.random.split(jax.random.key(0), depth)
    return [{"w": jax.random.normal(k, (width, width)) / 3, "b": jnp.full(width, 0.1)} for k in keys]


BATCH = {"x": jax.random.normal(jax.random.key(1), (4, 8)), "y": jax.random.normal(jax.random.key(2), (4, 8))}


def sgd(loss, vg=value_and_grad):
    def step(p, batch):
        value, g = vg(loss)(p, batch)
        return jax.tree.map(lambda a, b: a - 0.1 * b, p, g), value

    return step


@pytest.mark.parametrize("remat", [False, True, {"Layer_1": Remat.FULL}, Remat.PRODUCTS])
@pytest.mark.parametrize("skip", [False, True])
def test_mlp(remat, skip):
    step = sgd(lambda p, b: jnp.mean((mlp(p, b["x"], 3, skip) - b["y"]) ** 2))
    flat = taken_apart(step, mlp_parameters(3), BATCH, remat=remat)
    names = ["Layer_0", "Layer_1", "Layer_2"]
    assert layers_of(flat, Phase.FORWARD) == names
    assert layers_of(flat, Phase.BACKWARD) == names[::-1]
    forward = [(a[0], b[0]) for a, b, _ in crossing(flat) if a[1] == b[1] == Phase.FORWARD]
    want = [("Layer_0", "Layer_1"), ("Layer_1", "Layer_2")] + [("Layer_0", "Layer_2")] * skip
    assert sorted(forward) == sorted(want)


def test_backward_knows_layer_and_line():
    step = sgd(lambda p, b: jnp.mean((mlp(p, b["x"], 2) - b["y"]) ** 2))
    flat = taken_apart(step, mlp_parameters(2), BATCH, remat=True)
    for equation, mark in zip(flat.equations, flat.marks):
        line = source_info_util.summarize(equation.source_info)
        if mark.phase is not None:
            assert "test_trace_gradient.py" in line, f"{equation.primitive} {mark} at {line}"
    dots = [
        str(e.source_info.name_stack)
        for e, m in zip(flat.equations, flat.marks)
        if e.primitive.name == "dot_general" and m == replace(m, layer="Layer_0", phase=Phase.BACKWARD)
    ]
    assert dots and all("Layer_0" in stack for stack in dots)


def residual_bytes(flat):
    made = {
        v: v.aval.size * v.aval.dtype.itemsize
        for e, m in zip(flat.equations, flat.marks)
        if m.phase is Phase.FORWARD
        for v in e.outvars
    }
    read = {
        a
        for e, m in zip(flat.equations, flat.marks)
        if m.phase is Phase.BACKWARD
        for a in e.invars
        if not isinstance(a, Literal)
    }
    return sum(made.get(v, 0) for v in read)


def test_remat_keeps_layer_inputs_only():
    step = sgd(lambda p, b: jnp.mean((mlp(p, b["x"], 3) - b["y"]) ** 2))
    kept = [residual_bytes(taken_apart(step, mlp_parameters(3), BATCH, remat=r)) for r in (False, True)]
    assert kept[1] == 2 * BATCH["x"].nbytes < kept[0]


def test_what_is_computed_again_is_computed_where_it_is_read():
    """In a layer of two products and a loss, the first one's activation is not computed beside the loss."""

    def loss(params, batch):
        for p in params:
            batch = jnp.tanh(batch @ p)
        return jnp.mean(jnp.square(batch))

    shapes = [jax.ShapeDtypeStruct((8, 8), "float32")] * 2
    graph = capture(
        value_and_grad(loss), (shapes, jax.ShapeDtypeStruct((4, 8), "float32")), remat=Remat.PRODUCTS,
        assign=lambda g: replace(g, equations=tuple(replace(e, layer=0) for e in g.equations), layers=("",)),
    ).graph  # fmt: skip
    backward = [e.op for e in graph.equations if e.phase is Phase.BACKWARD]
    products = [i for i, op in enumerate(backward) if op == "dot_general"]
    again = [i for i, op in enumerate(backward) if op == "tanh"]
    assert len(again) == 2 and again[1] + 1 == products[0]


@pytest.mark.parametrize("dtype, rounded", [("float32", False), ("bfloat16", True)])
def test_rounding_to_the_own_precision_disappears_where_nothing_is_computed_in_a_higher_one(dtype, rounded):
    bits = jnp.finfo(dtype)
    graph = capture(
        lambda x: jax.lax.reduce_precision(x * 2, bits.nexp, bits.nmant) + 1,
        (jax.ShapeDtypeStruct((4,), dtype),),
    ).graph
    assert any(e.op == "reduce_precision" for e in graph.equations) is rounded


def test_identical_layers_give_identical_equations():
    step = sgd(lambda p, b: jnp.mean((mlp(p, b["x"], 5) - b["y"]) ** 2))
    flat = taken_apart(step, mlp_parameters(5), BATCH)

    def text(layer, phase):
        return [
            (e.primitive.name, [a.aval.str_short() for a in e.invars], str(e.params))
            for e, m in zip(flat.equations, flat.marks)
            if m.layer == f"Layer_{layer}" and m.phase is phase
        ]

    for phase in (Phase.FORWARD, Phase.BACKWARD):
        assert text(1, phase) == text(2, phase) == text(3, phase)


def test_tied_parameter_is_summed_once_per_step():
    def loss(p, b):
        with jax.named_scope("Layer_0"):
            x = b["x"] @ p[0]["w"]
        with jax.named_scope("Layer_1"):
            x = jnp.tanh(x @ p[1]["w"])
        with jax.named_scope("Layer_2"):
            return jnp.mean((x @ p[0]["w"].T - b["y"]) ** 2)

    flat = taken_apart(sgd(loss), mlp_parameters(2), BATCH)
    sums = [
        m for e, m in zip(flat.equations, flat.marks) if e.primitive.name == "add" and m.phase is Phase.APPLY
    ]
    assert [m.layer for m in sums] == [None]


def test_weight_decay_stays_with_its_parameters():
    def loss(p, b):
        return jnp.mean((mlp(p, b["x"], 3) - b["y"]) ** 2) + 0.01 * sum(
            jnp.sum(w**2) for w in jax.tree.leaves(p)
        )

    flat = taken_apart(sgd(loss), mlp_parameters(3), BATCH)
    used = {}
    for e, m in zip(flat.equations, flat.marks):
        for a in e.invars:
            if m.layer and a in flat.inputs[:6]:
                used.setdefault(a, set()).add(m.layer)
    assert all(len(layers) == 1 for layers in used.values())


def test_custom_derivatives_are_kept():
    @jax.custom_vjp
    def clipped(x):
        return x

    clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.01, 0.01),))
    step = sgd(lambda p, b: jnp.mean((clipped(mlp(p, b["x"], 2)) - b["y"]) ** 2))
    taken_apart(step, mlp_parameters(2), BATCH)


def test_remat_of_the_user():
    narrow = sgd(lambda p, b: jnp.mean((jax.checkpoint(mlp, static_argnums=2)(p, b["x"], 1) - b["y"]) ** 2))
    taken_apart(narrow, mlp_parameters(1), BATCH)
    wide = sgd(lambda p, b: jnp.mean((jax.checkpoint(mlp, static_argnums=2)(p, b["x"], 3) - b["y"]) ** 2))
    flat = taken_apart(wide, mlp_parameters(3), BATCH)
    assert layers_of(flat, Phase.BACKWARD) == ["Layer_2", "Layer_1", "Layer_0"]
    assert residual_bytes(flat) == 2 * BATCH["x"].nbytes


def test_operand_passed_twice_and_constants():
    table = np.linspace(0, 1, 32).reshape(4, 8)

    def step(p, b):
        frozen = p
        loss = lambda q: jnp.sum((mlp(q, b["x"], 2) - mlp(frozen, b["y"], 2) + table) ** 2)  # noqa: E731
        return value_and_grad(loss)(p)

    taken_apart(step, mlp_parameters(2), BATCH)


@pytest.mark.parametrize(
    "loss",
    [
        lambda p, b: jnp.float32(3.0),
        lambda p, b: p[0]["b"][0],
        lambda p, b: jnp.sum(p[0]["w"] ** 2),
        lambda p, b: jnp.mean(jax.lax.stop_gradient(mlp(p, b["x"], 2))) + p[1]["b"].sum(),
        lambda p, b: jnp.sum((b["x"] @ (p[0]["w"] + 1j)).real ** 2),
    ],
)
def test_odd_losses(loss):
    taken_apart(sgd(loss), mlp_parameters(2), BATCH)


def test_scalar_parameter_is_the_loss():
    taken_apart(lambda s: value_and_grad(lambda s: s)(s), jnp.float32(2.0))


def test_inside_loops_jax_differentiates():
    def step(p, b):
        def body(p, x):
            value, g = value_and_grad(lambda p: jnp.mean(mlp(p, x[None], 2) ** 2))(p)
            return jax.tree.map(lambda a, c: a - 0.1 * c, p, g), value

        p, values = jax.lax.scan(body, p, b["x"])
        outer = lambda p: jnp.sum(grad(lambda q: jnp.sum(mlp(q, b["x"], 2) ** 3))(p)[0]["w"] ** 2)  # noqa: E731
        return values, value_and_grad(outer)(p)

    taken_apart(step, mlp_parameters(2), BATCH)


def test_two_losses():
    def step(p, b):
        critic, gc = value_and_grad(lambda q: jnp.mean(mlp(q, b["x"], 2)))(p)
        maker, gm = value_and_grad(lambda q: jnp.mean(mlp(q, b["y"], 2) ** 2))(p)
        return critic + maker, jax.tree.map(jnp.add, gc, gm)

    taken_apart(step, mlp_parameters(2), BATCH)


def test_chained_gradients_are_refused():
    def step(p, b):
        inner = grad(lambda q: jnp.mean(mlp(q, b["x"], 2)))(p)
        return grad(lambda q: jnp.mean(mlp(q, b["y"], 2)))(inner)

    with pytest.raises(NotImplementedError, match=r"jax\.grad"):
        taken_apart(step, mlp_parameters(2), BATCH)


# ---------------------------------------------------------------- models


def gpt_step(config, vg=value_and_grad):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))

    def step(state, batch):
        p, o = state
        key = jax.random.key(5) if config.dropout else None
        value, g = vg(lambda p: gpt.loss(config, p, batch, key))(p)
        updates, o = tx.update(g, o, p)
        return (optax.apply_updates(p, updates), o), value, g

    p = gpt.init(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, config.vocabulary)
    return step, (p, tx.init(p)), {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


SMALL = gpt.GPTConfig(vocabulary=32, positions=8, layers=2, hidden=16, heads=2)


@pytest.mark.parametrize(
    "changes, remat",
    [
        ({"dropout": 0.2}, Remat.PARTS),
        *(
            pytest.param(changes, remat, marks=pytest.mark.slow)
            for changes, remat in (
                ({}, False),
                ({}, True),
                ({"dropout": 0.2}, True),
                ({"dropout": 0.2}, False),
                ({"remat": True}, False),
            )
        ),
    ],
)
def test_gpt(changes, remat):
    step, state, batch = gpt_step(replace(SMALL, **changes))

    def gradients(state, batch):
        _, value, g = step(state, batch)
        return value, g

    flat = taken_apart(gradients, state, batch, remat=remat)
    assert layers_of(flat, Phase.FORWARD) == ["Block_0", "Block_1"]


@pytest.mark.slow
def test_scan_gpt_is_one_equation_of_a_layer():
    step, state, batch = gpt_step(replace(SMALL, scan_layers=True))
    taken_apart(lambda s, b: step(s, b)[1:], state, batch)


class Anonymous(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.gelu(nn.Dense(8)(nn.LayerNorm()(x)))
        return x


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_anonymous_layers_given_by_assign(layers):
    model = Anonymous()
    p = model.init(jax.random.key(0), BATCH["x"])

    def even(graph):
        n = len(graph.equations)
        equations = tuple(replace(e, layer=i * layers // n) for i, e in enumerate(graph.equations))
        return replace(graph, equations=equations, layers=tuple(map(str, range(layers))))

    taken_apart(sgd(lambda p, b: jnp.mean((model.apply(p, b["x"]) - b["y"]) ** 2)), p, BATCH, assign=even)


# ---------------------------------------------------------------- random programs

OPERATIONS = (
    lambda x, y, w: jnp.tanh(x @ w),
    lambda x, y, w: x * y,
    lambda x, y, w: x + jax.nn.relu(y),
    lambda x, y, w: x - y.mean(0),
    lambda x, y, w: jax.nn.softmax(x) * w.sum(),
    lambda x, y, w: jax.lax.stop_gradient(x) + y,
    lambda x, y, w: jnp.where(x > y, x, 0.5 * y),
    lambda x, y, w: jnp.sort(x, 0) + (x > 0).astype(x.dtype) * y,
)


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(OPERATIONS) - 1),
            st.integers(0, 99),
            st.integers(0, 99),
            st.integers(0, 2),
            st.one_of(st.none(), st.integers(0, 3)),
        ),
        min_size=1,
        max_size=10,
    ),
    st.sampled_from([False, True, Remat.PARTS]),
)
def test_random_layered_programs(lines, remat):
    def loss(p, b):
        values = [b["x"], b["y"]]
        for operation, i, j, w, layer in lines:
            x, y = values[i % len(values)], values[j % len(values)]
            with jax.named_scope("outside" if layer is None else f"Layer_{layer}"):
                values.append(OPERATIONS[operation](x, y, p[w]["w"]))
        return jnp.mean(values[-1] ** 2) + jnp.mean(values[len(values) // 2]), values[-1]

    def step(p, b):
        return value_and_grad(loss, has_aux=True)(p, b)

    def sorted_names(graph):  # names come in order of first use; their numbers decide what is later
        order = sorted(range(len(graph.layers)), key=lambda k: graph.layers[k])
        place = {k: i for i, k in enumerate(order)}
        equations = tuple(
            replace(e, layer=None if e.layer is None else place[e.layer]) for e in graph.equations
        )
        return replace(graph, equations=equations, layers=tuple(graph.layers[k] for k in order))

    taken_apart(step, mlp_parameters(3), BATCH, remat=remat, assign=sorted_names)


# ---------------------------------------------------------------- what the backward pass keeps


def test_a_forward_tells_which_products_its_backward_keeps() -> None:
    def loss(w: Any, x: Any) -> Any:
        hidden = jnp.tanh(x @ w["a"] + w["b"])  # read by tanh, through a sum: kept
        return jnp.mean(hidden @ w["c"] + 3.0)  # read by sums only: not kept

    def step(w: Any, x: Any) -> Any:
        value, gradients = value_and_grad(loss)(w, x)
        return jax.tree.map(jnp.subtract, w, gradients), value

    f32 = jnp.float32
    w = {
        "a": jax.ShapeDtypeStruct((5, 7), f32),
        "b": jax.ShapeDtypeStruct((7,), f32),
        "c": jax.ShapeDtypeStruct((7, 3), f32),
    }
    x = jax.ShapeDtypeStruct((4, 5), f32)
    found = split(begin(step, (w, x)), 1).least_bytes
    assert found == 4 * (5 * 7 + 7 + 7 * 3) + 4 * (4 * 7)
    halves = split(begin(step, (w, x)), 2).least_bytes
    assert halves == 2 * 4 * (5 * 7 + 7 + 7 * 3) + 4 * (2 * 7), "sums of gradients, and half the examples"
