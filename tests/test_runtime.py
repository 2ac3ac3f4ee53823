"""Executables: results are the single device's; what is passed in and handed out behaves as promised."""

import functools
import gc
import pickle
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from autopar import runtime
from autopar.core.errors import BackendError, BadInput
from autopar.core.mesh import Axis, Device, Mesh
from autopar.core.plan import Plan, Stage
from autopar.models import gpt, mlp
from autopar.models.step import adamw, init_state, train_step
from autopar.program import check, emit, schedule
from autopar.runtime import DistributedArray, InProcess, load
from autopar.runtime.inprocess import InProcessSession
from autopar.sharding.plan import plan as shard
from autopar.stages import assign, cut
from autopar.trace.capture import capture
from autopar.trace.grad_equation import value_and_grad

SLOW = Device("slow", 1 << 34, 1e10, (("float32", 1e10),), 1e10)
"""So slow that spreading even these small models pays."""


def mesh(*sizes):
    axes = zip("yx"[2 - len(sizes) :], sizes)
    return Mesh(SLOW, tuple(Axis(name, size, 1e11, 1e-9) for name, size in axes))


def make_plan(traced, meshes, kind="1f1b", stage_of_layer=None):
    """A plan with even stages; layouts are the ILP's."""
    graph, count, first = traced.graph, len(traced.graph.layers), 0
    where = stage_of_layer or tuple(i * len(meshes) // count for i in range(count))
    segments, stages = cut(graph, where), []
    for s, on in enumerate(meshes):
        equations = sorted({e for x in segments if x.stage == s for e in x.equations})
        devices = tuple(("node", first + i) for i in range(on.size))
        first += on.size
        stages.append(
            Stage(where.index(s), where.index(s) + where.count(s), devices, shard(graph, equations, on))
        )
    ids = {v for s in segments for v in (*s.inputs, *s.outputs)}
    ids |= {*graph.inputs, *graph.constants, *(v for v in graph.outputs if v is not None)}
    return Plan(
        traced.fingerprint, graph.layers, tuple(stages), (), graph.microbatches, kind, segments,
        tuple((v, graph.values[v]) for v in sorted(ids)), graph.inputs, graph.outputs, graph.aliases,
        graph.batch, graph.constants, graph.combine, 0.0, 0.0,
    )  # fmt: skip


def program_of(plan):
    program = emit(plan, schedule(plan.schedule, len(plan.stages), plan.microbatches))
    check(program)
    return program


def executable(step, args, meshes, *, microbatches=1, kind="1f1b", backend=None, **options):
    three = functools.partial(assign, layers=3)  # where the model has no names
    traced = capture(step, args, assign=three, microbatches=microbatches)
    plan = make_plan(traced, meshes, kind)
    return load(plan, program_of(plan), traced, backend or InProcess(), **options)


def assert_close(got, want, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(b).max())))


def compare(step, state, batches, exe):
    """Runs both and compares every loss and the last state."""
    alone, mine = jax.jit(step), state
    for batch in batches:
        mine, loss = exe(mine, batch)
        state, want = alone(state, batch)
        assert_close(loss, want)
    assert_close(mine, state)
    return mine


# -- the models

PERCEPTRON = mlp.MLPConfig(inputs=16, hidden=32, outputs=8, layers=3)


@functools.cache
def perceptron():
    optimizer = adamw()
    step = train_step(functools.partial(mlp.loss, PERCEPTRON), optimizer, value_and_grad)
    return step, init_state(
        functools.partial(mlp.init, PERCEPTRON), optimizer, jax.random.key(0), dropout=False
    )


def vectors(seed, count=16):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(count, 16)), rng.normal(size=(count, 8))
    return {"inputs": x.astype(np.float32), "targets": y.astype(np.float32)}


WORDS = gpt.GPTConfig(vocabulary=64, positions=16, layers=3, hidden=32, heads=4, dropout=0.1)


@functools.cache
def language_model():
    # SGD: Adam makes an order-one update of a gradient that is truly zero (the attention's key bias).
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, momentum=0.9))
    step = train_step(functools.partial(gpt.loss, WORDS), optimizer, value_and_grad)
    return step, init_state(functools.partial(gpt.init, WORDS), optimizer, jax.random.key(0), dropout=True)


def text(seed, count=8):
    tokens = np.random.default_rng(seed).integers(0, 64, size=(count, 17))
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


# -- numerics

MESHES = {"8": (mesh(8),), "2x4": (mesh(2, 4),), "4+2+2": (mesh(2, 2), mesh(2), mesh(2))}


@pytest.mark.parametrize("meshes", MESHES)
def test_a_perceptron(meshes):
    step, state = perceptron()
    exe = executable(step, (state, vectors(0)), MESHES[meshes])
    compare(step, state, [vectors(i) for i in range(3)], exe)


@pytest.mark.slow
@pytest.mark.parametrize("meshes", MESHES)
def test_a_language_model_with_tied_embedding_clipping_and_dropout(meshes):
    step, state = language_model()
    exe = executable(step, (state, text(0)), MESHES[meshes])
    compare(step, state, [text(i) for i in range(3)], exe)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize("microbatches", [2, 4])
def test_micro_batches(kind, microbatches):
    step, state = perceptron()
    args = (state, vectors(0))
    exe = executable(step, args, (mesh(2, 2), mesh(2)), microbatches=microbatches, kind=kind)
    compare(step, state, [vectors(i) for i in range(2)], exe)


@pytest.mark.slow
def test_a_language_model_in_micro_batches_on_unlike_meshes():
    step, state = language_model()
    exe = executable(step, (state, text(0)), MESHES["4+2+2"], microbatches=4)
    compare(step, state, [text(i) for i in range(3)], exe)


# -- state


@pytest.fixture(scope="module")
def trained():
    """One executable on two stages, shared by the tests that only look at what goes in and comes out."""
    step, state = perceptron()
    return executable(step, (state, vectors(0)), (mesh(2), mesh(2)))


def fresh():
    return jax.tree.map(jnp.copy, perceptron()[1])


def test_what_the_caller_passes_stays_valid(trained):
    state = fresh()
    before = [np.array(x) for x in jax.tree.leaves(state)]
    first, _ = trained(state, vectors(0))
    trained(first, vectors(1))
    for array, value in zip(jax.tree.leaves(state), before):
        np.testing.assert_array_equal(np.asarray(array), value)


def test_what_a_step_returned_is_consumed_by_the_next(trained):
    first, _ = trained(fresh(), vectors(0))
    trained(first, vectors(1))
    with pytest.raises(
        BadInput, match=r"state\.step: this state was consumed by a later step; use the state"
    ):
        trained(first, vectors(2))
    trained(fresh(), vectors(0))  # and nothing is broken by it


def test_edited_restored_and_numpy_state_is_taken_as_it_is(trained):
    step, _ = perceptron()
    state, _ = trained(fresh(), vectors(0))
    edited = state._replace(params=jax.tree.map(lambda x: x * 0.5, runtime.fetch(state.params)))
    want = jax.jit(step)(jax.tree.map(np.asarray, edited), vectors(1))
    assert_close(trained(edited, vectors(1)), want)
    host = jax.tree.map(np.array, fresh())
    assert_close(trained(host, vectors(0)), jax.jit(step)(fresh(), vectors(0)))


def test_donated_arguments_are_taken_over():
    step, _ = perceptron()
    exe = executable(step, (fresh(), vectors(0)), (mesh(),), donate=True)
    exe(fresh(), vectors(0))
    devices = jax.devices()[0]
    state = jax.tree.map(lambda x: jax.device_put(x, devices), fresh())
    exe(state, vectors(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))


def test_state_is_donated_from_step_to_step():
    step, state = perceptron()
    for meshes in ((mesh(2),), (mesh(2), mesh(2))):
        exe = executable(step, (state, vectors(0)), meshes)
        first, _ = exe(state, vectors(0))
        exe(first, vectors(1))
        assert all(x.is_deleted() for x in jax.tree.leaves((first.params, first.optimizer)))


def test_memory_is_flat():
    step, state = perceptron()
    exe = executable(step, (state, vectors(0)), (mesh(2), mesh(2)))
    state, _ = exe(state, vectors(0))
    counts = []
    for i in range(200):
        state, loss = exe(state, vectors(i % 4))
        if i in (20, 199):
            loss.block_until_ready()
            gc.collect()
            counts.append((len(jax.live_arrays()), exe.held()))
    assert counts[0] == counts[1]


# -- arguments


def test_arguments_are_checked_by_name(trained):
    state = fresh()
    with pytest.raises(BadInput, match=r"batch\['inputs'\]: expected float32\[16,16\].*got float32\[8,16\]"):
        trained(state, vectors(0, count=8))
    wrong = state._replace(step=np.zeros((2,), np.int32))
    with pytest.raises(BadInput, match=r"state\.step: expected int32\[\].*got int32\[2\]"):
        trained(wrong, vectors(0))
    with pytest.raises(BadInput, match=r"another structure .*missing batch\['targets'\]"):
        trained(state, {"inputs": vectors(0)["inputs"]})
    with pytest.raises(BadInput, match="expected an array, got its shape only"):
        trained(jax.eval_shape(lambda: state), vectors(0))
    trained(state, vectors(0))


def test_numpys_wide_types_are_taken_as_jax_takes_them(trained):
    wide = {k: x.astype(np.float64) for k, x in vectors(0).items()}
    assert_close(trained(fresh(), wide)[1], trained(fresh(), vectors(0))[1], 1e-6)


def test_other_trees_and_results_that_are_no_state():
    def forward(params, batch, *, scale):
        h = jnp.tanh(batch["x"] @ params["w"])
        return {
            "h": h,
            "norm": jnp.sum(params["w"] ** 2) * scale,
            "same": params["w"],
            "none": None,
            "three": 3,
        }

    w, x = np.ones((8, 4), np.float32), np.ones((16, 8), np.float32)
    traced = capture(forward, ({"w": w}, {"x": x}), {"scale": 2.0}, assign=assign, batch_argnums=(1,))
    plan = make_plan(traced, (mesh(2),))
    exe = load(plan, program_of(plan), traced, InProcess())
    for scale in (2.0, 3.0):
        w += 1.0  # the same object with other numbers
        got = exe({"w": w}, {"x": x}, scale=scale)
        want = forward({"w": w}, {"x": x}, scale=scale)
        assert got["none"] is None and isinstance(got["three"], jax.Array) and got["three"] == 3
        assert_close([got[k] for k in ("h", "norm", "same")], [want[k] for k in ("h", "norm", "same")])


# -- what a plan became


def test_compiled_text_memory_and_timeline(trained):
    names = {s.name for s in trained.plan.segments}
    hlo = trained.compile().hlo()
    assert set(hlo) == names and all("HloModule" in text for text in hlo.values())
    for row, stage in zip(trained.memory(), trained.plan.stages, strict=True):
        assert row.peak > 0 and row.segment in names and row.limit == stage.memory.limit
    want = trained(fresh(), vectors(0))
    got = trained.measure(fresh(), vectors(0))
    assert_close(got, want)
    timeline = trained.timeline()
    assert {e.name for e in timeline.events if e.kind == "run"} == names
    assert all(0 <= e.start <= e.stop for e in timeline.events) and 0 < timeline.step_time < 60


def test_too_few_devices():
    step, state = perceptron()
    with pytest.raises(BackendError, match=r"needs 8 devices, this process has 4.*device_count=8"):
        executable(step, (state, vectors(0)), (mesh(8),), backend=InProcess(tuple(jax.devices()[:4])))


def test_a_failed_step_loses_the_state_and_nothing_else(monkeypatch):
    step, state = perceptron()
    exe = executable(step, (state, vectors(0)), (mesh(2), mesh(2)))
    want = exe(fresh(), vectors(0))[1]
    state, _ = exe(fresh(), vectors(1))
    monkeypatch.setattr(exe.session.transport, "take", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        exe(state, vectors(0))
    assert any("in the instruction" in note for note in caught.value.__notes__)
    monkeypatch.undo()
    assert_close(exe(fresh(), vectors(0))[1], want)


# -- leaves that are no jax.Array of this process


class Remote(InProcessSession):
    """A session that hands out host copies, as one in another process does."""

    local = False

    def fetcher(self, stage, buffers):
        get = super().fetcher(stage, buffers)

        def fetch():
            copies = [np.asarray(x) for x in get()()]
            return lambda: copies

        return fetch


class RemoteBackend:
    def start(self, plan, program, traced):
        return Remote(plan, program, traced, jax.devices())


def test_remote_state_and_results():
    step, state = perceptron()
    exe = executable(step, (state, vectors(0)), (mesh(2), mesh(2)), backend=RemoteBackend())
    mine, losses = state, []
    for i in range(3):
        last, (mine, loss) = mine, exe(mine, vectors(i))
        losses.append(loss)
    reference = jax.jit(step)
    for i in range(3):
        state, want = reference(state, vectors(i))
        np.testing.assert_allclose(
            float(losses[i]), want, rtol=1e-5
        )  # a loss stays readable after later steps
    kernel = mine.params[0]["kernel"]
    assert isinstance(kernel, DistributedArray) and kernel.shape == (16, 32) and not kernel.is_deleted()
    assert_close(mine, state)
    assert_close(runtime.fetch(mine), state)
    assert type(pickle.loads(pickle.dumps(kernel))) is np.ndarray
    stale = last.params[0]["kernel"]
    assert stale.is_deleted() and "consumed" in repr(stale)
    for use in (np.asarray, runtime.fetch, lambda x: x.block_until_ready()):
        with pytest.raises(BadInput, match=r"kernel.*consumed by step 3; use the state that step returned"):
            use(stale)
    with pytest.raises(BadInput, match="consumed by step 3"):
        exe(last, vectors(0))
    restored = runtime.fetch(mine)
    assert_close(exe(restored, vectors(7)), reference(state, vectors(7)))


def test_leaves_in_pieces():
    """A leaf that several values hold in turn along dim 0 is one array to the caller."""

    def step(state, batch):
        top, bottom = state
        h = batch @ top
        return (top - 0.1 * jnp.mean(h, 0), bottom * 0.5 + jnp.sum(h)), jnp.sum(h)

    def alone(whole, batch):
        (top, bottom), loss = step((whole[:4], whole[4:]), batch)
        return jnp.concatenate([top, bottom]), loss

    whole, batch = np.arange(18, dtype=np.float32).reshape(6, 3), np.ones((8, 4), np.float32)
    traced = capture(step, ((whole[:4], whole[4:]), batch), assign=assign)
    exe = pieced(traced, InProcess())
    state, (want, total) = whole, alone(whole, batch)
    for _ in range(2):
        last, (state, loss) = state, exe(state, batch)
        assert_close((state, loss), (want, total))
        want, total = alone(want, batch)
    assert isinstance(state, DistributedArray) and len(state.home.pieces) == 2
    assert last.is_deleted() and state.shape == (6, 3) and runtime.fetch(state).shape == (6, 3)


def pieced(traced, backend):
    """The executable of a trace whose first two leaves are told to be two pieces of one."""
    plan = make_plan(traced, (mesh(2),))

    def merge(leaves):
        one, two, *rest = leaves
        shape = (one.shape[0] + two.shape[0], *one.shape[1:])
        rest = [replace(leaf, position=i) for i, leaf in enumerate(rest, 1)]
        return (replace(one, shape=shape, values=(*one.values, *two.values), position=0), *rest)

    traced = replace(
        traced,
        leaves=merge(traced.leaves),
        out_leaves=merge(traced.out_leaves),
        in_tree=jax.tree.structure(((0, 0), {})),
        out_tree=jax.tree.structure((0, 0)),
    )
    return load(plan, program_of(plan), traced, backend)
