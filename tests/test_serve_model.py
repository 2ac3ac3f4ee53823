"""`autopar.serve.load`: what it generates, on one device and over unlike stages; what it refuses."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import autopar
from autopar.core.errors import BackendError, BadInput, DoesNotFit, UnknownName
from autopar.io.huggingface import open_random
from autopar.io.int8 import quantised
from autopar.io.weights import read_all
from autopar.runtime.cache import user_folder
from autopar.serve import Buckets

BUCKETS = Buckets(rows=(1, 4), new=(16,), blocks=(8,), tokens=64)
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 6, 7, 8], [1]]


@pytest.fixture(scope="module")
def alone():
    with autopar.serve.load("opt-tiny", weights="random", buckets=BUCKETS, tokens=512) as model:
        yield model


def test_prompts_of_unlike_lengths_generate_alone_and_together(alone):
    together = alone.generate(PROMPTS, max_new_tokens=6)
    assert together == [alone.generate(p, max_new_tokens=6) for p in PROMPTS]
    assert [len(ids) for ids in together] == [len(p) + 6 for p in PROMPTS]
    assert list(alone.stream(PROMPTS[0], max_new_tokens=6)) == together[0][3:]


def test_samples_repeat_for_a_seed_and_beams_come_best_first(alone):
    sampled = [alone.generate(PROMPTS[0], max_new_tokens=6, do_sample=True, seed=s) for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    beams = alone.generate(PROMPTS[0], max_new_tokens=4, num_beams=3, num_return_sequences=2)
    assert len(beams) == 2 and beams[0] != beams[1]


def test_what_cannot_be_is_refused_by_name(alone):
    with pytest.raises(BadInput, match="no option 'tempreature'"):
        list(alone.stream([1], tempreature=1.0))
    with pytest.raises(BadInput, match="all the same"):
        alone.generate([1], num_return_sequences=2)
    with pytest.raises(BadInput, match="known by its shapes only"):
        autopar.serve.load("opt-125m")
    with pytest.raises(UnknownName, match="opt-125m"):
        autopar.serve.load("opt-126m")
    with pytest.raises(BadInput, match="Pass cluster="):
        autopar.serve.load("opt-tiny", weights="random", backend=autopar.Ray(emulate=True))


def test_uneven_stages_generate_the_same(alone):
    cluster = "1xA100-40GB,1xV100-16GB,1xT4"
    with autopar.serve.load(
        "opt-tiny", weights="random", buckets=BUCKETS, tokens=512, cluster=cluster, stages=3
    ) as model:
        runner = model.engine.runner
        assert runner.groups == 3
        assert model.generate(PROMPTS, max_new_tokens=6) == alone.generate(PROMPTS, max_new_tokens=6)
        assert "3 stages" in str(model.plan) and model.plan_svg().lstrip().startswith("<?xml")


def test_int8_weights_over_cut_and_uneven_stages_give_the_quantised_models_tokens():
    small = quantised(open_random("opt-tiny"))
    module, config = small.module, small.config
    params = read_all(small.weights, module.parameter_shapes(config))
    forward = jax.jit(lambda ids: module.forward(config, params, ids).argmax(-1))
    with autopar.serve.load(
        "opt-tiny", weights="random", quantise="int8", cluster="2xT4,1xV100-16GB", stages=2, buckets=BUCKETS,
        tokens=512,
    ) as model:  # fmt: skip
        found = model.generate(PROMPTS, max_new_tokens=6)
        assert str(model.plan).startswith("opt-tiny in int8 and float32")
    for prompt, ids in zip(PROMPTS, found):
        likeliest = forward(jnp.asarray([ids]))[0]
        assert ids[len(prompt) :] == likeliest[len(prompt) - 1 : -1].tolist()
    with pytest.raises(BadInput, match="int4"):
        autopar.serve.load("opt-tiny", weights="random", quantise="int4")


def test_compiled_programs_lie_in_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = user_folder()
    assert folder.parent == tmp_path / "autopar" and folder == user_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # such are to be ignored (XDG base directories)
    assert user_folder().is_relative_to(Path.home() / ".cache")


def test_a_cluster_that_is_too_small_says_so(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("nodes: [{device: T4, memory: 0.5MB}]")
    with pytest.raises(DoesNotFit, match="are missing"):
        autopar.serve.load("opt-tiny", weights="random", cluster=str(path))


@pytest.mark.slow
def test_a_lost_worker_fails_its_clients_and_the_model_comes_back():
    backend = autopar.Ray(emulate=True, timeout=20)
    options = {"buckets": Buckets(rows=(2,), new=(16,), blocks=(8,), tokens=32), "tokens": 512, "stages": 2}
    with autopar.serve.load(
        "opt-tiny", weights="random", cluster="1xT4,1xV100-16GB", backend=backend, max_length=128, **options
    ) as model:
        want = model.generate([1, 2, 3], max_new_tokens=8, ignore_eos=True)
        running = model.stream([1, 2, 3], max_new_tokens=100, ignore_eos=True)
        next(running)
        os.kill(model.engine.runner.programs.base.session.pids[1], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(BackendError, match="stage 1 on node"):
            list(running)
        assert time.monotonic() - began < 10
        while not model.engine.health().restarts:
            assert time.monotonic() - began < 240
            time.sleep(0.5)
        assert model.generate([1, 2, 3], max_new_tokens=8, ignore_eos=True) == want
