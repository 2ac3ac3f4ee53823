"""Whatever else the engine does, a request's tokens stay the same; blocks are neither lost nor mixed up."""

import random
from dataclasses import replace

import numpy as np
import pytest

from autopar.serve.core import Core, Options
from autopar.serve.metrics import Meter
from autopar.serve.request import FinishReason, Output, Request, Sampling
from autopar.serve.stream import Stream
from tests.serve_fakes import ByteTokenizer, FakeRunner, greedy_answer, history_logits

EOS = 7


class Bench:
    """A core that is stepped by hand."""

    def __init__(self, runner=None, **options):
        self.runner = runner or FakeRunner()
        self.core = Core(self.runner, ByteTokenizer(), Options(eos=(EOS,), **options), Meter())
        self.jobs = {}

    def submit(self, request: Request) -> Stream:
        stream = Stream(request)
        job = self.core.job(request, stream, len(self.jobs))
        self.jobs[request.id] = job
        self.core.add(job)
        return stream

    def cancel(self, request: Request) -> None:
        if not self.jobs[request.id].done:
            self.core.cancel(self.jobs[request.id])

    def step(self) -> None:
        self.core.step()
        self.core.check()

    def finish(self) -> None:
        for _ in range(10_000):
            if self.core.idle:
                return
            self.step()
        raise AssertionError("does not come to an end")


def answers(stream: Stream) -> list[tuple]:
    """(tokens, text, finish, log probabilities, the prompt's) of each answer of a stream that has ended."""
    tokens, texts, ends, logs, prompt = {}, {}, {}, {}, None
    for piece in stream:
        assert piece.index not in ends, "a piece after the last"
        tokens.setdefault(piece.index, []).extend(piece.token_ids)
        texts[piece.index] = texts.get(piece.index, "") + piece.text
        logs.setdefault(piece.index, []).extend(piece.logprobs or ())
        prompt = piece.prompt_logprobs or prompt
        if piece.finish:
            ends[piece.index] = piece.finish
    return [(tokens[i], texts[i], ends[i], logs[i], prompt) for i in sorted(tokens)]


def random_request(
    rng: random.Random, prefixes: list[tuple[int, ...]], longest: int, kinds: tuple[int, ...]
) -> Request:
    prompt = list(rng.choice(prefixes)[: rng.randint(0, 24)])
    prompt += [rng.randrange(50) for _ in range(rng.randint(1, 12))]
    common = {"max_tokens": rng.randint(0, min(20, longest - len(prompt))), "seed": rng.randrange(1000)}
    kind = rng.choice(kinds)
    if kind == 0:
        sampling = Sampling(temperature=0, **common)
    elif kind == 1:
        sampling = Sampling(num_beams=rng.choice([2, 3]), n=rng.choice([1, 2]), **common)
    elif kind == 2:
        sampling = Sampling(n=rng.randint(1, 3), top_p=0.9, stop=("!", "\x05\x06"), **common)
    elif kind == 3:
        sampling = Sampling(n=1, best_of=rng.randint(1, 4), repetition_penalty=1.2, **common)
    elif kind == 4:
        sampling = Sampling(top_k=5, presence_penalty=0.5, logprobs=2, prompt_logprobs=1, **common)
    else:
        sampling = Sampling(temperature=0, n=2, stop_token_ids=(3, 4), **common)
    return Request(tuple(prompt), sampling, key=rng.choice("ab"))


def small_runner(rng: random.Random) -> FakeRunner:
    """One on which several requests compete for blocks."""
    size, groups = rng.choice([1, 4, 8]), rng.choice([1, 1, 2, 3])
    return FakeRunner(
        block_size=size,
        blocks=1 + rng.randint(150 // size, 190 // size),
        max_length=48,
        groups=groups,
        chains=groups == 1 and rng.random() < 0.7,
        row_buckets=rng.choice([(4,), (1, 2, 4, 8)]),
        new_buckets=rng.choice([(1, 4), (1, 4, 16), (8, 64)]),
        table_buckets=(4, -(-48 // size)),
    )


def alone(request: Request) -> list[tuple]:
    """The answers with nobody beside, ample room, no prefixes kept and the prompt in one piece."""
    bench = Bench(FakeRunner(blocks=80, new_buckets=(1, 64)), prefix_cache=False)
    stream = bench.submit(request)
    bench.finish()
    return answers(stream)


def schedule_once(seed: int) -> tuple[int, int]:
    """Runs a random schedule and compares all answers; returns numbers of preemptions and chained steps."""
    rng = random.Random(seed)
    bench = Bench(small_runner(rng), prefix_cache=rng.random() < 0.7, prefill_tokens=rng.choice([None, 8]))
    prefixes = [tuple(rng.randrange(50) for _ in range(24)) for _ in range(2)]
    live, gone, all_of_them = [], set(), []
    kinds = rng.choice([(0, 1, 2, 3, 4, 5), (0, 5), (0,)])
    for _ in range(rng.randint(5, 14)):
        for _ in range(rng.randint(0, 3)):
            request = random_request(rng, prefixes, bench.core.longest, kinds)
            all_of_them.append((request, bench.submit(request)))
            live.append(request)
        for _ in range(rng.randint(0, 6)):
            if not bench.core.idle:
                bench.step()
        if live and rng.random() < 0.3:
            gone.add((victim := rng.choice(live)).id)
            bench.cancel(victim)
            bench.core.check()
    bench.finish()
    assert bench.core.blocks.held == 0
    bench.core.blocks.check([])
    for request, stream in all_of_them:
        got, expected = answers(stream), alone(request)
        if request.id in gone and any(end is FinishReason.CANCELLED for _, _, end, *_ in got):
            for (tokens, text, *_), (right, right_text, *_) in zip(got, expected):
                if request.sampling.streams:
                    assert tokens == right[: len(tokens)] and right_text.startswith(text)
            continue
        assert got == expected, request
    return bench.core.scheduler.preemptions, bench.runner.chained


@pytest.mark.parametrize("start", range(0, 240, 24))
def test_other_requests_never_change_a_requests_tokens(start):
    preemptions, chained = zip(*(schedule_once(seed) for seed in range(start, start + 24)))
    assert sum(preemptions) > 0 and sum(chained) > 0, "the schedules are too easy"


def test_greedy_tokens_are_the_models():
    bench = Bench()
    prompts = [tuple(range(n, 2 * n)) for n in (1, 4, 5, 20)]
    streams = [
        bench.submit(Request(p, Sampling(max_tokens=9, temperature=0, ignore_eos=True))) for p in prompts
    ]
    bench.finish()
    for prompt, stream in zip(prompts, streams):
        assert answers(stream)[0][0] == greedy_answer(prompt, 9)
    assert bench.runner.transfers == 0, "greedy rows need no logits"


def test_sampled_tokens_repeat_for_a_seed_and_differ_without():
    request = Request((1, 2, 3), Sampling(max_tokens=16, n=2, ignore_eos=True))
    seeded = replace(request, sampling=replace(request.sampling, seed=5))
    first, second = alone(seeded), alone(seeded)
    assert first == second and first[0][0] != first[1][0]
    assert alone(request) != alone(request)


def test_answers_share_the_prompts_blocks_and_part_at_the_half_full_one():
    bench = Bench()
    stream = bench.submit(Request(tuple(range(18)), Sampling(max_tokens=3, n=4, seed=1, ignore_eos=True)))
    while not (bench.core.scheduler.running and len(bench.core.scheduler.running) == 4):
        bench.step()
    bench.step()
    assert bench.core.blocks.held == 4 + 4, "four full blocks together, the fifth each their own"
    assert bench.runner.copied == 3
    bench.finish()
    assert len(answers(stream)) == 4


def test_the_second_of_two_equal_prompts_computes_one_token():
    bench = Bench()
    prompt = tuple(range(33))
    for cached in (0, 32):
        bench.runner.steps.clear()
        stream = bench.submit(Request(prompt, Sampling(max_tokens=2, temperature=0, ignore_eos=True)))
        bench.finish()
        assert {piece.cached_tokens for piece in stream} == {cached}
    assert [new for _, new, _ in bench.runner.steps] == [1, 1]


def test_equal_prompts_that_come_together_are_computed_once():
    bench = Bench(FakeRunner(blocks=200))
    prompt, other = tuple(range(33)), (1, 2, 3, 4)
    asked = [prompt, prompt, other, (*prompt[:30], 1, 2, 3), (*prompt[:4], 9, 9, 9, 9, 9)]
    streams = [
        bench.submit(Request(p, Sampling(max_tokens=2, temperature=0, ignore_eos=True))) for p in asked
    ]
    bench.finish()
    cached = [{piece.cached_tokens for piece in stream} for stream in streams]
    assert cached == [{0}, {32}, {0}, {28}, {4}]


def test_prefixes_are_shared_only_within_a_salt():
    bench = Bench()
    for salt in ("", "other"):
        stream = bench.submit(Request(tuple(range(33)), Sampling(max_tokens=1), salt=salt))
        bench.finish()
        assert {piece.cached_tokens for piece in stream} == {0}


def test_equal_blocks_are_shared_only_after_equal_beginnings():
    bench = Bench()
    first, second = tuple(range(4)), tuple(range(4, 8))
    for prompt in (first + second + (9,), second + first + (9,), first + first + (9,)):
        stream = bench.submit(Request(prompt, Sampling(max_tokens=2, temperature=0, ignore_eos=True)))
        bench.finish()
        assert answers(stream)[0][0] == greedy_answer(prompt, 2)


def test_kept_prefixes_go_least_recently_used_first_and_only_when_room_is_needed():
    bench = Bench(FakeRunner(blocks=1 + 8))
    old, new = tuple(range(16)), tuple(range(20, 36))
    for prompt in (old, new, old):
        bench.submit(Request(prompt, Sampling(max_tokens=1, temperature=0)))
        bench.finish()
    assert bench.core.blocks.kept == 8
    bench.submit(Request(tuple(range(40, 49)), Sampling(max_tokens=1, temperature=0)))
    bench.finish()
    for prompt, cached in ((old, 12), (new, 4)):
        stream = bench.submit(Request(prompt, Sampling(max_tokens=1, temperature=0)))
        bench.finish()
        assert {piece.cached_tokens for piece in stream} == {cached}


def test_prompt_logprobs_are_those_of_the_prompt():
    bench = Bench()
    prompt = tuple(range(30, 49))
    bench.submit(Request(prompt, Sampling(max_tokens=1)))
    bench.finish()
    stream = bench.submit(Request(prompt, Sampling(max_tokens=0, prompt_logprobs=2)))
    bench.finish()
    (piece,) = list[Output](stream)
    assert piece.prompt_logprobs is not None and piece.prompt_logprobs[0] is None
    assert piece.finish is FinishReason.LENGTH and not piece.token_ids
    for at, found in enumerate(piece.prompt_logprobs[1:], 1):
        logits = history_logits(np.array(prompt[:at]), 50).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum())
        assert found is not None and found.token == prompt[at]
        assert found.logprob == pytest.approx(logprobs[prompt[at]], abs=1e-5)
        assert [token for token, _ in found.top] == np.argsort(-logprobs)[:2].tolist()


def test_a_pipelines_stages_are_kept_busy():
    class Watching(FakeRunner):
        most = 0

        def run(self, batch, every=False):
            self.most = max(self.most, len(bench.core._flight) + 1)
            return super().run(batch, every)

    bench = Bench(Watching(groups=3, blocks=200, delay=0))
    for n in range(6):
        bench.submit(Request((n, n), Sampling(max_tokens=12, temperature=0, ignore_eos=True)))
    bench.finish()
    assert bench.runner.most == 3
    decode = [rows for rows, new, _ in bench.runner.steps if new == 1]
    assert max(decode) == 2, "a third of the rows each"


def test_prompts_are_cut_where_padding_would_be_more_than_half():
    bench = Bench(FakeRunner(blocks=200, new_buckets=(1, 4, 32)))
    bench.submit(Request(tuple(range(10)), Sampling(max_tokens=1, temperature=0)))
    bench.submit(Request(tuple(range(10, 30)), Sampling(max_tokens=1, temperature=0)))
    bench.finish()
    first, *_, last = [(rows, new) for rows, new, _ in bench.runner.steps if new > 1]
    assert first == (1, 4) and last == (1, 32)


def test_prefill_and_decode_steps_take_turns():
    bench = Bench(FakeRunner(blocks=200, new_buckets=(1, 4)))
    bench.submit(Request((1, 2), Sampling(max_tokens=20, temperature=0, ignore_eos=True)))
    bench.step()
    bench.step()
    bench.runner.steps.clear()
    bench.submit(Request(tuple(range(24)), Sampling(max_tokens=1, temperature=0)))
    for _ in range(8):
        bench.step()
    kinds = [new for _, new, _ in bench.runner.steps]
    assert kinds == [4, 1] * 4, "answers under way go on while a long prompt is read"


def test_short_prompts_that_come_together_are_read_before_they_decode():
    bench = Bench(FakeRunner(blocks=200, new_buckets=(1, 4), row_buckets=(1, 2, 8), max_tokens=8))
    for n in range(8):
        bench.submit(Request((n, n + 1, n + 2), Sampling(max_tokens=4, temperature=0, ignore_eos=True)))
    bench.finish()
    assert [(rows, new) for rows, new, _ in bench.runner.steps] == [(2, 4)] * 4 + [(8, 1)] * 3


def test_few_short_prompts_let_many_answers_go_on():
    bench = Bench(FakeRunner(blocks=200, new_buckets=(1, 4), row_buckets=(1, 8, 16), max_tokens=4))
    request = lambda n: Request((n, n + 1), Sampling(max_tokens=30, temperature=0, ignore_eos=True))  # noqa: E731
    for n in range(8):
        bench.submit(request(n))
    for _ in range(14):
        bench.step()
    bench.runner.steps.clear()
    for n in (20, 30):
        bench.submit(request(n))
    for _ in range(4):
        bench.step()
    assert [new for _, new, _ in bench.runner.steps] == [4, 1, 4, 1]


def test_a_first_token_goes_out_before_the_next_step_starts():
    class Watching(FakeRunner):
        def run(self, batch, every=False):
            seen.append(stream._pieces.qsize())
            return super().run(batch, every)

    seen: list[int] = []
    bench = Bench(Watching(blocks=200, new_buckets=(1, 4)))
    stream = bench.submit(Request((1, 2), Sampling(max_tokens=3, temperature=0, ignore_eos=True)))
    bench.finish()
    assert seen[:2] == [0, 1]


def test_keys_get_their_weighted_shares():
    bench = Bench(FakeRunner(blocks=17, row_buckets=(1, 2)), weights={"heavy": 3.0}, prefix_cache=False)
    streams = {"heavy": [], "light": []}
    for n in range(24):
        for key in ("light", "heavy"):
            request = Request((n,) * 4, Sampling(max_tokens=8, temperature=0, ignore_eos=True), key=key)
            streams[key].append(request.id)
            bench.submit(request)
    while sum(job.done for job in bench.jobs.values()) < 24:
        bench.step()
    done = {key: sum(bench.jobs[id].done for id in ids) for key, ids in streams.items()}
    assert 2 <= done["heavy"] / done["light"] <= 4, done
