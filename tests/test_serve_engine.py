"""The engine's thread: streams, cancellation, full queues, failures, restarts, draining, figures."""

import asyncio
import threading
import time

import pytest

from autopar.serve.engine import Engine, Options
from autopar.serve.request import (
    BadParameter,
    FinishReason,
    QueueFull,
    Request,
    Sampling,
    Unavailable,
)
from tests.serve_fakes import ByteTokenizer, FakeRunner, greedy_answer

GREEDY = Sampling(max_tokens=8, temperature=0, ignore_eos=True)


@pytest.fixture
def engine():
    with Engine(FakeRunner(), ByteTokenizer(), Options(eos=(7,), queue_requests=3)) as engine:
        yield engine
        assert engine.drain(10)
        engine._core.blocks.check([])


def tokens(stream) -> list[int]:
    return [token for piece in stream for token in piece.token_ids]


def wait_until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.002)


def hold(engine: Engine) -> None:
    """Keeps the engine within a step until its runner's gate is set."""
    engine.runner.gate.clear()
    engine.submit(Request((1,), GREEDY))
    wait_until(lambda: engine.metrics().running == 1)


def test_requests_from_many_threads_get_their_own_answers(engine):
    wrong = []

    def client(n: int) -> None:
        for at in range(4):
            prompt = (n, at, n)
            while True:
                try:
                    stream = engine.submit(Request(prompt, GREEDY))
                    break
                except QueueFull:
                    time.sleep(0.01)
            if tokens(stream) != greedy_answer(prompt, 8):
                wrong.append(prompt)

    threads = [threading.Thread(target=client, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert engine.metrics().finished == {"length": 32}


def test_streams_can_be_awaited(engine):
    async def client(n: int) -> list[int]:
        stream = engine.submit(Request((n,), GREEDY))
        return [token async for piece in stream for token in piece.token_ids]

    async def clients() -> list[list[int]]:
        return await asyncio.gather(*[client(n) for n in range(3)])

    assert asyncio.run(clients()) == [greedy_answer((n,), 8) for n in range(3)]


def test_pieces_come_while_the_answer_is_made(engine):
    stream = iter(engine.submit(Request((1, 2), Sampling(max_tokens=30, temperature=0, ignore_eos=True))))
    first = next(stream)
    assert first.token_ids and first.finish is None and first.prompt_tokens == 2
    rest = list(stream)
    assert [piece.finish for piece in rest] == [None] * (len(rest) - 1) + [FinishReason.LENGTH]
    assert rest[-1].completion_tokens == 30


def test_an_end_token_ends_the_answer_and_has_no_text():
    prompt = next((n,) for n in range(50) if 7 in greedy_answer((n,), 8)[1:])
    expected = greedy_answer(prompt, 8)
    expected = expected[: expected.index(7) + 1]
    with Engine(FakeRunner(), ByteTokenizer(), Options(eos=(7,))) as engine:
        pieces = list(engine.submit(Request(prompt, Sampling(max_tokens=8, temperature=0))))
        assert [t for p in pieces for t in p.token_ids] == expected
        assert "".join(p.text for p in pieces) == bytes(expected[:-1]).decode()
        assert pieces[-1].finish is FinishReason.STOP and pieces[-1].stop is None
        by_token = list(
            engine.submit(Request(prompt, Sampling(temperature=0, stop_token_ids=(expected[1],))))
        )
        assert by_token[-1].stop == expected[1] and by_token[-1].completion_tokens == 2


def test_a_stop_string_ends_the_answer_before_itself(engine):
    answer = greedy_answer((3,), 8)
    text = bytes(answer).decode()
    sampling = Sampling(max_tokens=8, temperature=0, ignore_eos=True, stop=(text[3:5],))
    pieces = list(engine.submit(Request((3,), sampling)))
    at = text.index(text[3:5])
    assert "".join(p.text for p in pieces) == text[:at]
    assert pieces[-1].finish is FinishReason.STOP and pieces[-1].stop == text[3:5]
    assert pieces[-1].completion_tokens == at + 2
    assert tokens(pieces) == answer[: at + 2]


def test_cancelling_frees_the_blocks_and_ends_the_stream(engine):
    engine.runner.delay = 0.03
    sampling = Sampling(max_tokens=60, n=2, ignore_eos=True)
    streams = [engine.submit(Request((n,), sampling)) for n in range(2)]
    next(iter(streams[0]))
    streams[0].cancel()
    ended = [piece.finish for piece in streams[0] if piece.finish]
    assert ended == [FinishReason.CANCELLED] * 2
    engine.cancel(streams[1].id)
    engine.cancel("nobody's")
    assert {piece.finish for piece in streams[1] if piece.finish} == {FinishReason.CANCELLED}
    wait_until(lambda: engine.metrics().blocks_held == 0)
    assert engine.metrics().finished == {"cancelled": 2}


def test_a_full_queue_refuses_and_says_when_to_come_back(engine):
    hold(engine)
    waiting = [engine.submit(Request((n,), GREEDY)) for n in range(3)]
    with pytest.raises(QueueFull, match="3 requests are waiting") as refused:
        engine.submit(Request((9,), GREEDY))
    assert refused.value.retry_after >= 1
    assert engine.metrics().rejected == 1 and engine.metrics().queued == 3
    engine.runner.gate.set()
    assert [tokens(stream) for stream in waiting] == [greedy_answer((n,), 8) for n in range(3)]
    assert tokens(engine.submit(Request((9,), GREEDY))) == greedy_answer((9,), 8)


def test_the_queue_is_bounded_by_tokens_but_one_request_may_always_wait():
    with Engine(FakeRunner(), options=Options(queue_tokens=20)) as engine:
        hold(engine)
        engine.submit(Request((1,) * 30, GREEDY))
        with pytest.raises(QueueFull):
            engine.submit(Request((1,), GREEDY))
        engine.runner.gate.set()
        assert engine.drain(10)


def test_bad_requests_are_named(engine):
    for request, words in [
        (Request(()), "prompt must have at least one token"),
        (Request((50,)), "token ids from 0 to 49"),
        (Request((-1,)), "token ids from 0 to 49"),
        (Request((1,) * 64), "prompt must have at most 63 tokens, but has 64"),
        (Request((1,) * 60, Sampling(max_tokens=5)), "max_tokens must be at most 4, as prompt"),
        (Request((1,), Sampling(num_beams=9, n=9)), "num_beams must be at most 8"),
        (Request((1,), Sampling(top_p=2)), "top_p must be"),
    ]:
        with pytest.raises(BadParameter, match=words):
            engine.submit(request)
    whole = Request((1,) * 64, Sampling(max_tokens=0, prompt_logprobs=0))
    assert len(next(iter(engine.submit(whole))).prompt_logprobs or ()) == 64
    open_end = engine.submit(Request((1,) * 60, Sampling(max_tokens=None, ignore_eos=True)))
    assert len(tokens(open_end)) == 4


def test_stop_strings_need_a_tokenizer():
    with Engine(FakeRunner()) as engine:
        with pytest.raises(BadParameter, match="stop needs text"):
            engine.submit(Request((1,), Sampling(stop=("a",))))
        pieces = list(engine.submit(Request((1,), GREEDY)))
        assert [t for p in pieces for t in p.token_ids] == greedy_answer((1,), 8)
        assert not any(piece.text for piece in pieces)


def test_requests_submitted_together_share_their_first_step_or_are_all_refused(engine):
    together = [Request((n, n, n), GREEDY) for n in range(3)]
    streams = engine.submit_all(together)
    assert [tokens(stream) for stream in streams] == [greedy_answer(r.prompt, 8) for r in together]
    assert [rows for rows, new, _ in engine.runner.steps if new > 1] == [4]
    with pytest.raises(BadParameter):
        engine.submit_all([Request((1,), GREEDY), Request((), GREEDY)])
    with pytest.raises(QueueFull):
        engine.submit_all([Request((n,), GREEDY) for n in range(4)])
    assert engine.metrics().requests == 3 and engine.metrics().rejected == 4


def test_an_id_is_used_once_at_a_time(engine):
    hold(engine)
    first = engine.submit(Request((1,), GREEDY, id="mine"))
    with pytest.raises(BadParameter, match="'mine'"):
        engine.submit(Request((2,), GREEDY, id="mine"))
    engine.runner.gate.set()
    assert tokens(first) and tokens(engine.submit(Request((2,), GREEDY, id="mine")))


@pytest.mark.parametrize("where", ["fail_run", "fail_wait"])
def test_a_failure_ends_what_was_under_way_and_the_rest_goes_on_after_a_restart(where):
    broken, spare = FakeRunner(row_buckets=(1,), groups=1, delay=0.02), FakeRunner()
    seen = []

    def restart():
        seen.append(engine.health().state)
        return spare

    with Engine(broken, ByteTokenizer(), restart=restart) as engine:
        running = iter(engine.submit(Request((1,), Sampling(max_tokens=60, n=1, ignore_eos=True))))
        next(running)
        waiting = engine.submit(Request((5, 6), GREEDY))
        setattr(broken, where, "the GPU fell off the bus")
        last = list(running)[-1]
        assert last.finish is FinishReason.ERROR and "fell off the bus" in (last.error or "")
        assert tokens(waiting) == greedy_answer((5, 6), 8)
        health = engine.health()
        assert seen == ["restarting"] and health.state == "ready" and health.restarts == 1
        assert "fell off the bus" in (health.error or "") and (health.since or -1) >= 0
        assert tokens(engine.submit(Request((8,), GREEDY))) == greedy_answer((8,), 8)
        assert engine.metrics().restarts == 1 and engine.metrics().finished["error"] == 1
    assert spare.closed


def test_a_failure_that_cannot_be_mended_ends_everything():
    def restart():
        raise OSError("no GPU left")

    for way in (None, restart):
        runner = FakeRunner(delay=0.02)
        with Engine(runner, restart=way) as engine:
            streams = [engine.submit(Request((n,), Sampling(max_tokens=60, n=2))) for n in range(20)]
            runner.fail_wait = "broken"
            for stream in streams:
                assert {p.finish for p in stream if p.finish} == {FinishReason.ERROR}
            wait_until(lambda: engine.health().state == "failed")
            assert not engine.health().ok
            with pytest.raises(Unavailable, match="failed"):
                engine.submit(Request((1,), GREEDY))
            assert engine.metrics().running == engine.metrics().queued == 0


def test_logits_that_are_not_numbers_end_the_request_only():
    class Overflowing(FakeRunner):
        def logits(self, history):
            return super().logits(history) * (float("nan") if history[0] == 13 else 1)

    with Engine(Overflowing(), ByteTokenizer()) as engine:
        bad = engine.submit(Request((13,), Sampling(max_tokens=5, n=2)))
        good = engine.submit(Request((1, 2), GREEDY))
        ends = [p for p in bad if p.finish]
        assert {p.finish for p in ends} == {FinishReason.ERROR} and "not numbers" in (ends[0].error or "")
        beams = [
            p.finish for p in engine.submit(Request((13,), Sampling(num_beams=2, max_tokens=3))) if p.finish
        ]
        assert beams == [FinishReason.ERROR]
        assert tokens(good) == greedy_answer((1, 2), 8)
        assert engine.health().state == "ready"


def test_draining_finishes_what_was_taken_and_refuses_more(engine):
    engine.runner.delay = 0.01
    stream = engine.submit(Request((1,), GREEDY))
    assert not engine.drain(0.001)
    with pytest.raises(Unavailable, match="draining"):
        engine.submit(Request((2,), GREEDY))
    assert engine.drain(10) and tokens(stream) == greedy_answer((1,), 8)
    assert engine.health().state == "draining" and not engine.health().ok


def test_closing_ends_what_runs_with_an_error():
    runner = FakeRunner(delay=0.02)
    engine = Engine(runner)
    stream = engine.submit(Request((1,), Sampling(max_tokens=60)))
    waiting = iter(stream)
    next(waiting)
    engine.close()
    engine.close()
    last = list(waiting)[-1]
    assert last.finish is FinishReason.ERROR and "closed" in (last.error or "")
    assert runner.closed and engine.health().state == "closed"
    with pytest.raises(Unavailable):
        engine.submit(Request((1,), GREEDY))


def test_figures_add_up(engine):
    for n in range(3):
        tokens(engine.submit(Request((n, 1), Sampling(max_tokens=5, n=2, ignore_eos=True))))
    engine.drain(10)
    found = engine.metrics()
    assert (found.requests, found.prompt_tokens, found.answer_tokens) == (3, 6, 30)
    assert found.first_token.count == 3 and found.inter_token.count == 24 and found.latency.count == 3
    assert found.queue_time.count == 3 and found.batch.sum == 3 + 24 and found.steps == found.step_time.count
    assert found.blocks_held == 0 and found.blocks == 32


def test_best_of_returns_the_likeliest_whatever_order_they_end_in(engine):
    made = Sampling(max_tokens=6, n=5, seed=3, logprobs=0)
    totals, texts = {}, {}
    for piece in engine.submit(Request((4, 5), made)):
        totals[piece.index] = (piece.cumulative_logprob or 0) / piece.completion_tokens
        texts.setdefault(piece.index, []).extend(piece.token_ids)
    ranked = sorted(totals, key=lambda index: -totals[index])
    picked = Sampling(max_tokens=6, n=2, best_of=5, seed=3)
    pieces = list(engine.submit(Request((4, 5), picked)))
    assert [piece.index for piece in pieces] == [0, 1]
    assert [list(piece.token_ids) for piece in pieces] == [texts[index] for index in ranked[:2]]
    assert all(piece.logprobs is None and piece.finish for piece in pieces)


def test_a_long_answer_draws_anew_at_each_place():
    class Flat(FakeRunner):
        def logits(self, history):
            return super().logits(history) * 0

    with Engine(Flat(max_length=512, blocks=200, table_buckets=(128,))) as engine:
        drawn = tokens(engine.submit(Request((1,), Sampling(max_tokens=500, seed=1))))
    assert len(set(drawn)) == 50
