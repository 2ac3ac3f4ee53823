"""The compiled runner: tokens of any plan equal a single device's, blocks are copied, all logits agree."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import autopar
from autopar.api.planning import make
from autopar.api.serving import Programs, Served, Shape
from autopar.core.errors import BadInput
from autopar.serve.batch import StepBatch
from autopar.serve.runner import COPIES, Buckets, CompiledRunner, table_buckets
from tests import paged

CONFIG = paged.Config()
WEIGHTS = paged.weights(CONFIG)
BUCKETS = Buckets(rows=(1, 4), new=(16,), blocks=(4,), tokens=16)


def runner_on(text: str, backend=None) -> CompiledRunner:
    """A runner whose stages are the parts of a short cluster text."""
    served = Served(paged, CONFIG, blocks=17, block_size=16, dtype=jnp.float32)
    cluster, first = autopar.Cluster.parse(text), Shape(1, 1, 4)
    method = autopar.Auto(micro_batches=1, stages=text.count(",") + 1)
    base = make(served.tracer(first), cluster, method, lambda words: None)
    programs = Programs(served, base, cluster, backend or autopar.InProcess(), lambda words: None)
    programs.adopt(first)
    programs.place(paged.Weights(CONFIG))
    return CompiledRunner(programs, BUCKETS, CONFIG.vocabulary, CONFIG.positions)


def prefill(runner: CompiledRunner, prompt: list[int], table: np.ndarray) -> int:
    """Runs a prompt in chunks of 16; returns the next token."""
    for start in range(0, len(prompt), 16):
        chunk = prompt[start : start + 16]
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(chunk)] = chunk
        last = runner.run(
            StepBatch(tokens, np.array([start], np.int32), np.array([len(chunk)], np.int32), table[None])
        )
    assert last.greedy()[0] == last.last()[0].argmax()
    return int(last.greedy()[0])


def generate(runner: CompiledRunner, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens: prompts one by one, then all decoded together."""
    tables = np.arange(1, 1 + 4 * len(prompts), dtype=np.int32).reshape(-1, 4)
    found = [[prefill(runner, p, t)] for p, t in zip(prompts, tables)]
    for _ in range(count - 1):
        at = [len(p) + len(f) - 1 for p, f in zip(prompts, found)]
        tokens = np.array([[f[-1]] for f in found], np.int32)
        ones = np.ones(len(found), np.int32)
        for f, token in zip(
            found, runner.run(StepBatch(tokens, np.array(at, np.int32), ones, tables)).greedy()
        ):
            f.append(int(token))
    return found


PROMPTS = [list(map(int, np.random.default_rng(1).integers(0, 64, n))) for n in (3, 20, 17)]


@pytest.mark.parametrize(
    "cluster", ["1xT4", "1xT4,1xV100-16GB", "1xA100-40GB,2xV100-16GB,1xT4"], ids=["one", "two", "three"]
)
def test_tokens_equal_a_single_devices(cluster: str):
    runner = runner_on(cluster)
    stages = runner.programs.base.made.plan.stages
    assert runner.groups == len(stages) == cluster.count(",") + 1
    try:
        assert generate(runner, PROMPTS, 8) == [paged.reference(CONFIG, WEIGHTS, p, 8) for p in PROMPTS]
    finally:
        runner.close()


def asked(runner: CompiledRunner, sampled: tuple[int, ...] | None, sent: list) -> tuple[int, tuple]:
    """A step of three rows of which some are sampled: (bytes that the workers sent, (tokens, logits))."""
    tables = np.arange(1, 13, dtype=np.int32).reshape(3, 4)
    ones = np.ones(3, np.int32)
    before = len(sent)
    found = runner.run(StepBatch(np.full((3, 1), 7, np.int32), 20 * ones, ones, tables, sampled))
    results = found.greedy(), None if sampled == () else found.last()
    return sum(x.nbytes for arrays in sent[before:] for x in arrays), results


def test_copied_blocks_hold_what_the_others_held():
    runner = runner_on("1xT4,1xV100-16GB")
    prompt, table = PROMPTS[1], np.array([1, 2, 3, 0], np.int32)
    token = prefill(runner, prompt, table)
    runner.copy([(1, 9), (2, 12)])
    moved = np.array([[9, 12, 5, 0]], np.int32)
    decode = [np.array([[token]], np.int32), np.array([len(prompt)], np.int32), np.ones(1, np.int32)]
    want = runner.run(StepBatch(*decode, table[None])).last()
    np.testing.assert_array_equal(runner.run(StepBatch(*decode, moved)).last(), want)
    wrong = runner.run(StepBatch(*decode, np.array([[9, 11, 5, 0]], np.int32))).last()
    assert not np.array_equal(wrong, want)


def test_all_logits_agree_with_the_last_ones():
    runner = runner_on("1xT4").compile()
    compiled = set(runner.programs._known)
    tokens = np.array([PROMPTS[1][:16]], np.int32)
    batch = StepBatch(
        tokens, np.zeros(1, np.int32), np.array([11], np.int32), np.array([[1, 2, 0, 0]], np.int32)
    )
    all_of_them = runner.run(batch, every=True)
    assert all_of_them.every().shape == (1, 16, 64)
    last = runner.run(batch)
    np.testing.assert_allclose(all_of_them.last(), last.last(), rtol=1e-5, atol=1e-5)
    assert all_of_them.greedy() == last.greedy()
    with pytest.raises(BadInput, match="every=True"):
        last.every()
    assert set(runner.programs._known) == compiled, "all shapes were there before"
    assert compiled == {*BUCKETS.shapes(), *BUCKETS.scoring(), *COPIES}


def test_a_batch_beyond_the_buckets_is_refused():
    runner = runner_on("1xT4")
    rows = np.zeros(5, np.int32)
    with pytest.raises(BadInput, match="larger than any"):
        runner.run(StepBatch(np.zeros((5, 1), np.int32), rows, rows, np.zeros((5, 4), np.int32)))


def test_buckets_are_checked_and_hold_the_longest_sequence():
    with pytest.raises(BadInput, match="rising"):
        Buckets(rows=(4, 2))
    with pytest.raises(BadInput, match="no room"):
        Buckets(new=(1024,), tokens=512)
    assert table_buckets(2048, 16) == (32, 128)
    assert table_buckets(2048, 16, fine=True) == (4, 8, 16, 32, 128)
    assert table_buckets(10, 16) == (1,)


def test_tokens_on_ray_equal_a_single_devices(monkeypatch: pytest.MonkeyPatch):
    runner = runner_on("1xT4,1xV100-16GB", autopar.Ray(emulate=True))
    session = runner.programs.base.session
    sent, watch = [], session._watch
    monkeypatch.setattr(session, "_watch", lambda *args: sent.append(watch(*args)) or sent[-1])
    try:
        assert len(session.pids) == 2
        assert generate(runner, PROMPTS, 4) == [paged.reference(CONFIG, WEIGHTS, p, 4) for p in PROMPTS]
        runner.copy([(1, 13)])
        whole, (all_tokens, all_logits) = asked(runner, None, sent)
        assert (len(all_tokens), all_logits.shape) == (3, (3, 64)) and whole == 4 * 4 + 4 * 64 * 4
        bytes_sent, (tokens, none) = asked(runner, (), sent)
        assert bytes_sent == 4 * 4 and none is None and tokens.tolist() == all_tokens.tolist()
        bytes_sent, (tokens, some) = asked(runner, (2,), sent)
        assert bytes_sent == 4 * 4 + 64 * 4 and tokens.tolist() == all_tokens.tolist()
        np.testing.assert_array_equal(some[2], all_logits[2])
        assert max(session.memory()) < 2e6 < min(session.most_resident())
    finally:
        runner.close()
