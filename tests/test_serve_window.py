"""Windows of decode steps: the same logits as the whole model's, whoever else writes to the cache between."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import autopar
from autopar.api.serving import Shape
from autopar.api.windows import Window
from autopar.io.huggingface import open_random
from autopar.io.weights import read_all
from autopar.serve import Buckets, window
from autopar.serve.batch import StepBatch
from autopar.serve.window import _Rows

BUCKETS = Buckets(rows=(8,), new=(16,), blocks=(3,), tokens=32)  # no prefill step has eight rows
PROMPTS = [list(map(int, np.random.default_rng(3).integers(0, 256, n))) for n in (5, 14, 9)]


FILLED = []
"""The windows that were filled, in order."""


def counted(enter):
    def count(self, *args):
        FILLED.append(self)
        return enter(self, *args)

    return count


@pytest.fixture(scope="module")
def model():
    changes = {"weights": "random", "buckets": BUCKETS, "tokens": 2048, "max_length": 48, "behind": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "LEAST_ROWS", 1)
        patch.setattr(window, "GREEDY_ROWS", 1)
        patch.setattr(Window, "enter", counted(Window.enter))
        with autopar.serve.load("opt-tiny", **changes) as model:
            yield model


@functools.cache
def forward():
    found = open_random("opt-tiny")
    module, config = found.module, found.config
    params = read_all(found.weights, module.parameter_shapes(config))
    return jax.jit(lambda ids: module.forward(config, params, ids)[0])


def logits_of(ids: list[int]) -> np.ndarray:
    """What the whole model says after each of these tokens."""
    return np.asarray(forward()(jnp.asarray([[*ids, *[0] * (48 - len(ids))]])))


class Driver:
    """Two rows of sequences on a runner, by hand."""

    def __init__(self, runner):
        self.runner, self.windowed = runner, 0  # steps that went on in the window of the step before
        self.ids: list[list[int]] = [[], []]
        self.logits: list[dict[int, np.ndarray]] = [{}, {}]  # by position
        self.tables = np.array([[1, 2, 3], [4, 5, 6]], np.int32)

    def prefill(self, row: int, prompt: list[int], table: list[int] | None = None) -> None:
        self.tables[row] = self.tables[row] if table is None else table
        tokens = np.zeros((1, 16), np.int32)
        tokens[0, : len(prompt)] = prompt
        at = np.zeros(1, np.int32), np.array([len(prompt)], np.int32)
        found = self.runner.run(StepBatch(tokens, *at, self.tables[row : row + 1])).greedy()
        self.ids[row], self.logits[row] = [*prompt, int(found[0])], {}

    def decode(self, count: int, greedy: bool = False) -> None:
        for _ in range(count):
            tokens = np.array([ids[-1:] for ids in self.ids], np.int32)
            at = np.array([len(ids) - 1 for ids in self.ids], np.int32)
            batch = StepBatch(tokens, at, np.ones(2, np.int32), self.tables, () if greedy else None)
            filled = len(FILLED)
            results = self.runner.run(batch)
            assert self.runner._windows._held is not None
            self.windowed += len(FILLED) == filled
            if greedy:
                for ids, token in zip(self.ids, results.greedy().tolist(), strict=True):
                    ids.append(token)
                continue
            found = results.last()
            for row, ids in enumerate(self.ids):
                self.logits[row][int(at[row])] = found[row]
                ids.append(int(found[row].argmax()))

    def check(self) -> None:
        for ids, found in zip(self.ids, self.logits, strict=True):
            want = logits_of(ids)
            for at, logits in found.items():
                np.testing.assert_allclose(logits, want[at], rtol=1e-4, atol=1e-5)


def test_rows_that_go_on_do_so_in_a_window(model):
    driver = Driver(model._runner)
    driver.prefill(0, PROMPTS[0])
    driver.prefill(1, PROMPTS[1])
    driver.decode(8)
    assert driver.windowed == 7, "all but the first"
    driver.check()


def test_a_prompt_in_the_same_blocks_at_the_next_position_is_not_taken_for_the_old_row(model):
    driver = Driver(model._runner)
    driver.prefill(0, PROMPTS[0])
    driver.prefill(1, PROMPTS[1])
    driver.decode(3)
    later = list(map(int, np.random.default_rng(4).integers(0, 256, len(driver.ids[0]) - 1)))
    driver.prefill(0, later)  # as many tokens as the old row would have now
    driver.decode(4)
    driver.check()
    assert driver.windowed == 2 + 3


def test_copied_blocks_are_seen_and_the_cache_is_complete(model):
    driver = Driver(model._runner)
    driver.prefill(0, PROMPTS[2])
    driver.prefill(1, PROMPTS[1])
    driver.decode(3)
    driver.runner.copy([(1, 9)])  # written in a window, read from the cache
    driver.tables[0, 0] = 9
    driver.decode(3)
    driver.check()


def test_a_window_is_filled_again_in_the_memory_it_had(model):
    driver = Driver(model._runner)
    driver.prefill(0, PROMPTS[2])
    driver.prefill(1, PROMPTS[1])
    driver.decode(3)
    window = driver.runner._windows._held
    before = places(window)
    driver.runner.copy([(1, 9)])
    driver.tables[0, 0] = 9
    assert driver.runner._windows._held is None
    driver.decode(3)
    driver.check()
    assert driver.windowed == 2 + 2
    assert places(window) == before


def test_one_window_at_a_time_has_memory(model):
    driver = Driver(model._runner)
    driver.prefill(0, PROMPTS[0])
    driver.prefill(1, PROMPTS[1])
    driver.decode(3)
    first = driver.runner._windows._held
    assert held_by(first)
    driver.decode(3, greedy=True)
    assert driver.runner._windows._held is not first and not held_by(first)


def held_by(window):
    """The arrays that a window has now."""
    session = window.loaded.session
    found = [session.fetcher(stage, [buffer])()()[0] for stage, _, buffer, _ in window._moves]
    return [x for x in found if x is not None]


def places(window):
    """Where that is in memory."""
    return {part.data.unsafe_buffer_pointer() for x in held_by(window) for part in x.addressable_shards}


def test_greedy_steps_do_without_logits_and_others_go_on_from_them(model):
    driver = Driver(model._runner)
    driver.prefill(0, PROMPTS[0])
    driver.prefill(1, PROMPTS[1])
    driver.decode(2)
    assert len(driver.runner._windows._held.loaded.results) == 2
    driver.decode(4, greedy=True)
    assert len(driver.runner._windows._held.loaded.results) == 1
    driver.decode(3)
    assert driver.windowed == 1 + 3 + 2
    driver.check()
    for prompt, ids in zip((PROMPTS[0], PROMPTS[1]), driver.ids, strict=True):
        assert ids[len(prompt) :] == logits_of(ids).argmax(-1)[len(prompt) - 1 : len(ids) - 1].tolist()


def test_requests_that_come_and_go_keep_their_tokens(model):
    together = model.generate(PROMPTS, max_new_tokens=10)
    for prompt, ids in zip(PROMPTS, together):
        assert ids[len(prompt) :] == logits_of(ids).argmax(-1)[len(prompt) - 1 : len(ids) - 1].tolist()


def test_other_rows_positions_or_blocks_do_not_follow():
    shape, one = Shape(2, 1, 3), np.ones(2, np.int32)
    at, tables = np.array([4, 7], np.int32), np.array([[1, 2, 0], [3, 0, 0]], np.int32)
    last = _Rows(shape, at, one, tables)
    grown = np.array([[1, 2, 9], [3, 8, 0]], np.int32)
    assert last.lead_to(_Rows(shape, at + 1, one, tables)) and last.lead_to(_Rows(shape, at + 1, one, grown))
    assert not last.lead_to(_Rows(shape, at, one, tables))
    assert not last.lead_to(_Rows(shape._replace(blocks=4), at + 1, one, tables))
    assert not last.lead_to(_Rows(shape, at + 1, np.array([1, 0], np.int32), tables))
    assert not last.lead_to(_Rows(shape, at + 1, one, tables[::-1]))
