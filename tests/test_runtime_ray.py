"""The Ray backend on emulated nodes: a process per stage, the numbers of one device; failures are named,
and leave nothing behind."""

import contextlib
import dataclasses
import functools
import os
import pickle
import signal
import socket
import time

import jax
import numpy as np
import psutil
import pytest

from autopar import runtime
from autopar.core.errors import BackendError, BadInput, StageFailed
from autopar.runtime import load
from autopar.runtime.ray_backend import Ray
from autopar.runtime.ray_backend.nodes import Nodes
from autopar.trace.capture import capture
from tests.test_runtime import (
    assert_close,
    compare,
    language_model,
    make_plan,
    mesh,
    perceptron,
    program_of,
    text,
    vectors,
)

pytest.importorskip("ray")

SECONDS = 10.0
"""In which a failure is told."""


def placed(plan, names=("left", "right")):
    """The plan with every stage on a node of its own."""
    stages = [
        dataclasses.replace(stage, devices=tuple((name, i) for i in range(stage.mesh.size)))
        for stage, name in zip(plan.stages, names, strict=True)
    ]
    return dataclasses.replace(plan, stages=tuple(stages))


@functools.cache
def perceptron_plan(microbatches=2, kind="1f1b"):
    step, state = perceptron()
    traced = capture(step, (state, vectors(0)), assign=assign_three, microbatches=microbatches)
    return placed(make_plan(traced, (mesh(2, 2), mesh(2)), kind)), traced


def assign_three(*args):
    from autopar.stages import assign

    return assign(*args, layers=3)


def start(plan, traced, **options):
    return load(plan, program_of(plan), traced, Ray(emulate=True, **options))


@pytest.fixture(scope="module")
def cluster():
    """One emulated cluster for all tests of this file; nothing of it is left at the end."""
    nodes, before = Nodes(perceptron_plan()[0], None, True), psutil.Process().children(recursive=True)
    nodes.connect()
    started = [
        p for p in psutil.Process().children(recursive=True) if p not in before
    ]  # other tests' helpers
    assert any("raylet" in process.name() for process in started)
    yield nodes
    nodes.close()
    _, alive = psutil.wait_procs(started, timeout=SECONDS)
    assert not alive


@pytest.fixture(scope="module")
def trained(cluster):
    """One executable of a perceptron on two stages, for the tests that break nothing."""
    with start(*perceptron_plan()) as exe:
        yield exe


@pytest.fixture
def fragile(cluster):
    """Another one, with short patience, to be broken."""
    with start(*perceptron_plan(), timeout=2.0) as exe:
        yield exe


def test_an_address_that_is_not_reachable():  # before a cluster is connected to
    with socket.create_server(("127.0.0.1", 0)) as gone:
        address = f"127.0.0.1:{gone.getsockname()[1]}"
    plan, traced = perceptron_plan()
    begun = time.monotonic()
    with pytest.raises(BackendError, match=rf"no Ray cluster at {address} \(.*refused.*ray start --head"):
        load(plan, program_of(plan), traced, Ray(address=address, platform="cpu"))
    assert time.monotonic() - begun < 30


def test_nothing_listens_beyond_loopback(trained):
    heard = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            heard |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert heard and all(ip.removeprefix("::ffff:") in ("127.0.0.1", "::1") for ip in heard)


def test_every_stage_is_a_process_on_its_node(trained):
    pids = trained.session.pids
    assert len({os.getpid(), *pids}) == 3 and all(map(psutil.pid_exists, pids))


def test_a_perceptron_in_micro_batches_on_unlike_meshes(trained):
    step, state = perceptron()
    compare(step, state, [vectors(i) for i in range(3)], trained)


def test_state_stays_remote_and_makes_a_checkpoint(trained):
    step, state = perceptron()
    one, _ = trained(state, vectors(0))
    leaves = jax.tree.leaves(one.params, is_leaf=lambda x: isinstance(x, runtime.DistributedArray))
    assert leaves and all(isinstance(x, runtime.DistributedArray) for x in leaves)
    saved = pickle.dumps(runtime.fetch(one))
    _, loss = trained(one, vectors(1))
    with pytest.raises(BadInput, match="was consumed by"):
        np.asarray(one.params[0]["kernel"])
    again, same = trained(pickle.loads(saved), vectors(1))
    assert float(loss) == float(same)
    assert_close(again, jax.jit(step)(pickle.loads(saved), vectors(1))[0])


def test_what_the_workers_tell(trained):
    _, state = perceptron()
    want = runtime.fetch(trained(state, vectors(0)))
    names = {segment.name for segment in trained.plan.segments}
    hlo = trained.hlo()
    assert set(hlo) == names and all("HloModule" in text for text in hlo.values())
    assert all(row.peak > 0 and row.segment in names for row in trained.memory())
    assert all(held > 0 for held in trained.held()) and all(r > 1 << 20 for r in trained.session.resident())
    assert_close(trained.measure(state, vectors(0)), want)
    timeline = trained.timeline()
    assert {event.name for event in timeline.events if event.kind == "run"} == names
    assert all(0 <= event.start <= event.stop for event in timeline.events)


def test_memory_donated_in_the_plan_is_donated_in_the_workers(trained):
    """An export forgets donations; the workers give them again."""
    assert any(row.aliased > 0 for row in trained.memory())


@pytest.mark.slow
def test_a_language_model_with_tied_embedding_clipping_and_dropout(cluster):
    step, state = language_model()
    traced = capture(step, (state, text(0)), assign=assign_three, microbatches=2)
    with start(placed(make_plan(traced, (mesh(2), mesh(2)))), traced) as exe:
        compare(step, state, [text(i) for i in range(3)], exe)


@pytest.mark.slow
def test_gpipe(cluster):
    step, state = perceptron()
    with start(*perceptron_plan(4, "gpipe")) as exe:
        compare(step, state, [vectors(i) for i in range(2)], exe)


# -- failures


def fails(exe, state, match):
    """Steps until it fails; returns the error, which must come in time."""
    begun = time.monotonic()
    with pytest.raises(StageFailed, match=match) as caught:
        for i in range(1000):
            state, loss = exe(state, vectors(i))
            float(loss)
    assert time.monotonic() - begun < SECONDS
    return caught.value


def test_a_killed_worker_is_named_and_a_new_start_goes_on(fragile):
    step, state = perceptron()
    one, _ = fragile(state, vectors(0))
    saved = runtime.fetch(one)
    for i in range(4):
        one, _ = fragile(one, vectors(i))
    os.kill(fragile.session.pids[1], signal.SIGKILL)  # with steps under way
    error = fails(fragile, one, "stage 1 on node right failed: its process died")
    assert (error.stage, error.node) == (1, "right")
    with pytest.raises(StageFailed, match="start again from a checkpoint"):
        fragile(saved, vectors(0))
    old = fragile.session.pids
    fragile.close()
    assert gone(old)
    with start(*perceptron_plan()) as exe:
        compare(step, saved, [vectors(i) for i in range(2)], exe)


def gone(pids):
    """Whether these processes end soon."""
    deadline = time.monotonic() + SECONDS
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(psutil.pid_exists, pids))


def test_a_worker_that_hangs_is_named_and_killed(fragile):
    _, state = perceptron()
    state, _ = fragile(state, vectors(0))
    pids = fragile.session.pids
    os.kill(pids[0], signal.SIGSTOP)
    fails(fragile, state, "stage 0 on node left failed: it did not answer within")
    fragile.close()
    assert gone(pids)


def test_a_closed_session_says_so(fragile):
    _, state = perceptron()
    state, loss = fragile(state, vectors(0))
    fragile.close()
    fragile.close()
    with pytest.raises(BackendError, match="the session is closed"):
        float(loss)
    with pytest.raises(BackendError, match="the session is closed"):
        fragile(perceptron()[1], vectors(0))


def test_a_segment_that_fails_names_its_stage(fragile, monkeypatch):
    """Feeds of a wrong shape get past the driver here; the worker that trips over them is the one named."""
    _, state = perceptron()
    state, _ = fragile(state, vectors(0))
    session = fragile.session
    feeds = [{b: np.zeros((3, 3), np.float32) for b in worker.feeds} for worker in fragile.program]
    session.step(feeds)
    with pytest.raises(StageFailed, match=r"stage 0 on node left failed: \w+: .*"):
        session.memory()


# -- before it starts


def test_another_cluster_than_the_one_connected_to(cluster):
    plan, traced = perceptron_plan()
    with pytest.raises(BackendError, match=r"connected to \(127\.0\.0\.1.*ray\.shutdown"):
        load(plan, program_of(plan), traced, Ray(address="192.0.2.1:6379"))


def test_devices_that_the_cluster_lacks(cluster):
    plan, traced = perceptron_plan()
    device = dataclasses.replace(mesh(2).device, name="T4")
    stages = [
        dataclasses.replace(
            stage,
            sharding=dataclasses.replace(
                stage.sharding, mesh=dataclasses.replace(stage.sharding.mesh, device=device)
            ),
        )
        for stage in plan.stages
    ]
    plan = dataclasses.replace(plan, stages=tuple(stages))
    with pytest.raises(BackendError, match=r"lacks 6 × T4 \(it has 0\).*--resources='\{\"T4\": 6\}'"):
        load(plan, program_of(plan), traced, Ray(platform="cpu"))


def test_small_stages_leave_the_large_node_to_the_large_stage(cluster):
    """Placed one by one, the second worker went where four devices are, and the third found no such node."""
    traced = perceptron_plan()[1]
    names = ("small", "also small", "large")
    with start(placed(make_plan(traced, (mesh(2), mesh(2), mesh(4))), names), traced) as exe:
        assert len(set(exe.session.pids)) == 3


def large_plan():
    """A plan that needs as many devices as the cluster of this file has, but too many on one node."""
    plan, traced = perceptron_plan()
    stages = [
        dataclasses.replace(stage, sharding=dataclasses.replace(stage.sharding, mesh=mesh(*sizes)))
        for stage, sizes in zip(plan.stages, ((5, 1), (1,)), strict=True)  # the cluster has 4 + 2
    ]
    return dataclasses.replace(plan, stages=tuple(stages)), traced


def test_a_stage_that_no_node_is_large_enough_for(cluster, monkeypatch):
    from autopar.runtime.ray_backend import nodes

    monkeypatch.setattr(nodes, "START", 0.2)
    plan, traced = large_plan()
    with pytest.raises(BackendError, match=r"stage 0: 5 × slow; .*, each on one node.*in all: \d+ × slow"):
        load(plan, program_of(plan), traced, Ray(platform="cpu"))


def test_an_emulated_cluster_that_cannot_grow(cluster, monkeypatch):
    from autopar.runtime.ray_backend import nodes

    def fail(*args):
        raise OSError("its nodes did not start")

    plan = large_plan()[0]
    asking = Nodes(plan, None, True)
    try:
        asking.connect()
        monkeypatch.setattr(nodes, "SETTLE", 0.1)
        monkeypatch.setattr(nodes._SHARED.emulated, "ask", fail)
        with pytest.raises(BackendError, match=r"could not be extended \(its nodes did not start\)"):
            asking.reserve(plan, False)
    finally:
        asking.close()


def test_a_stage_across_nodes_is_refused():
    plan, traced = perceptron_plan()
    wide = dataclasses.replace(plan.stages[1], devices=(("a", 0), ("b", 0)))
    plan = dataclasses.replace(plan, stages=(plan.stages[0], wide))
    with pytest.raises(NotImplementedError, match=r"stage 1 spans the nodes a, b; .*InProcess"):
        start(plan, traced)


@pytest.mark.parametrize(
    "options",
    [{"address": "x:1", "emulate": True}, {"platform": "tpu"}, {"timeout": 0.0}, {"timeout": float("nan")}],
)
def test_options_that_make_no_sense(options):
    with pytest.raises(BadInput):
        Ray(**options)


# -- over time


@pytest.mark.slow
def test_memory_of_every_process_is_flat(trained):
    _, state = perceptron()
    sizes = []
    for i in range(260):
        state, loss = trained(state, vectors(i % 4))
        float(loss)
        if i in (60, 259):
            sizes.append((trained.held(), (psutil.Process().memory_info().rss, *trained.session.resident())))
    (held, before), (later, after) = sizes
    assert held == later
    assert all(b - a < 10 << 20 for a, b in zip(before, after, strict=True)), (before, after)
