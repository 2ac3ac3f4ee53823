"""Beam search gives Hugging Face's answers, alone and beside others, and whatever is preempted."""

from dataclasses import dataclass

import numpy as np
import pytest

from autopar.serve.beam import BeamSearch
from autopar.serve.core import Core, Options
from autopar.serve.metrics import Meter
from autopar.serve.request import FinishReason, Request, Sampling
from autopar.serve.sampling import log_softmax
from autopar.serve.stream import Stream
from tests.serve_fakes import FakeRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
VOCABULARY, EOS = 24, 5
KNOWN: dict[tuple[int, ...], np.ndarray] = {}  # logits after a history


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=64,
        n_embd=16,
        n_layer=2,
        n_head=2,
        eos_token_id=EOS,
        bos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # larger weights, so that beams differ
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@dataclass
class TorchRunner(FakeRunner):
    """A Hugging Face model behind the tokens of the block pool."""

    vocabulary: int = VOCABULARY
    model: object = None

    def logits(self, history: np.ndarray) -> np.ndarray:
        key = tuple(history.tolist())
        if key not in KNOWN:
            with torch.no_grad():
                KNOWN[key] = self.model(torch.tensor(history[None])).logits[0, -1].numpy()
        return KNOWN[key]


def ask(core: Core, requests: list[Request]) -> list[list[tuple]]:
    """(tokens, finish, log probability) of the answers to each."""
    streams = []
    for order, request in enumerate(requests):
        streams.append(Stream(request))
        core.add(core.job(request, streams[-1], order))
    while not core.idle:
        core.step()
        core.check()
    return [[(p.token_ids, p.finish, p.cumulative_logprob) for p in stream] for stream in streams]


def generate(model, prompt: tuple[int, ...], n: int, **options) -> list[tuple[int, ...]]:
    """Hugging Face's answers, best first, without padding."""
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": EOS, "eos_token_id": EOS, **options}
    out = model.generate(torch.tensor([prompt]), num_return_sequences=n, **options)
    answers = []
    for row in out[:, len(prompt) :].tolist():
        answers.append(tuple(row[: row.index(EOS) + 1] if EOS in row else row))
    return answers


PROMPTS = [(1,), (2, 3, 4), tuple(range(6, 17)), (20, 1, 20, 1)]


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 2},
        {"num_beams": 4},
        {"num_beams": 4, "length_penalty": 0.0},
        {"num_beams": 3, "length_penalty": 2.0},
        {"num_beams": 3, "length_penalty": -1.0},
        {"num_beams": 4, "early_stopping": True},
        {"num_beams": 4, "repetition_penalty": 1.4},
        {"num_beams": 5, "max_new_tokens": 1},
        {"num_beams": 8, "max_new_tokens": 16},
    ],
)
def test_answers_are_hugging_faces(model, options):
    options = dict(options)
    count = options["num_beams"]
    length = options.pop("max_new_tokens", 12)
    core = Core(TorchRunner(model=model, blocks=200), None, Options(eos=(EOS,)), Meter())
    requests = [Request(p, Sampling(max_tokens=length, n=count, temperature=0, **options)) for p in PROMPTS]
    ended = 0
    for prompt, got in zip(PROMPTS, ask(core, requests)):
        expected = generate(model, prompt, count, max_new_tokens=length, **options)
        assert [tokens for tokens, *_ in got] == expected, prompt
        ended += sum(finish is FinishReason.STOP for _, finish, _ in got)
        if "repetition_penalty" in options:
            continue
        for tokens, _, logprob in got:
            assert logprob == pytest.approx(score(model, prompt, tokens), abs=1e-3)
    assert ended or length == 1, "no answer ends by itself: the test is too easy"


def score(model, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> float:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0]
    logprobs = torch.log_softmax(logits, -1)
    return sum(float(logprobs[len(prompt) - 1 + at, token]) for at, token in enumerate(tokens))


def test_beams_that_are_preempted_give_the_same_answers(model):
    options = Options(eos=(EOS,), prefix_cache=False)
    core = Core(TorchRunner(model=model, blocks=1 + 12), None, options, Meter())
    sampling = Sampling(max_tokens=10, num_beams=3, n=3, temperature=0)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[3], PROMPTS[1]]
    got = ask(core, [Request(prompt, sampling) for prompt in prompts])
    assert core.scheduler.preemptions > 0, "there is room for all"
    for prompt, answers in zip(prompts, got):
        assert [tokens for tokens, *_ in answers] == generate(
            model, prompt, 3, num_beams=3, max_new_tokens=10
        )


def test_a_search_wide_enough_finds_the_likeliest_answer():
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(3, 4, 4)).astype(np.float32) * 2  # logits of step, last token

    def logprobs(beams):
        step = len(beams[0])
        return log_softmax(np.stack([tables[step, beam[-1] if beam else 0] for beam in beams]))

    search = BeamSearch(64, frozenset(), 3, length_penalty=0.0)
    while search.advance(logprobs(search.tokens)):
        pass
    best = {}
    for a in range(4):
        for b in range(4):
            for c in range(4):
                parts = [logprobs([()])[0, a], logprobs([(a,)])[0, b], logprobs([(a, b)])[0, c]]
                best[a, b, c] = float(sum(parts))
    ranked = sorted(best, key=lambda tokens: -best[tokens])
    assert [found.tokens for found in search.found] == ranked
    assert search.found[0].score == pytest.approx(best[ranked[0]], abs=1e-5)
