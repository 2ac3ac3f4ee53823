"""The engine over real models and KV blocks: its tokens are transformers', mixed and preempted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autopar.io.huggingface import open_directory
from autopar.io.weights import read_all
from autopar.serve.core import Core, Options
from autopar.serve.metrics import Meter
from autopar.serve.request import Request, Sampling
from autopar.serve.stream import Stream

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
transformers = pytest.importorskip("transformers")
VOCABULARY, EOS = 97, 2
QUICK = {"xla_backend_optimization_level": 0}


class PlainLogits:
    def __init__(self, logits, lengths):
        self._logits, self._lengths = logits, lengths

    def every(self):
        return np.asarray(self._logits)

    def last(self):
        return self.every()[np.arange(len(self._lengths)), np.maximum(self._lengths - 1, 0)]

    def greedy(self):
        return self.last().argmax(-1).astype(np.int32)


class PlainRunner:
    """A model's step as it is, jitted, without plan or program."""

    vocabulary, block_size, max_length, groups, chains = VOCABULARY, 8, 96, 1, False
    row_buckets, new_buckets, table_buckets, max_tokens = (4, 8), (1, 16), (12,), 16

    def __init__(self, checkpoint, blocks):
        module, config = checkpoint.module, checkpoint.config
        params = read_all(checkpoint.weights, module.parameter_shapes(config))
        shapes = module.DECODER.cache_shapes(config, blocks, self.block_size, jnp.float32)
        self.blocks, self._module = blocks, module
        self._cache = jax.tree.map(lambda x: jnp.full(x.shape, 9.0, x.dtype), shapes)
        step = functools.partial(module.step, config, params, every=True)
        self._step = jax.jit(step, donate_argnums=0, compiler_options=QUICK)

    def run(self, batch, every=False):
        arrays = batch.tokens, batch.positions, batch.lengths, batch.tables
        logits, self._cache = self._step(self._cache, *map(jnp.array, arrays))
        return PlainLogits(logits, batch.lengths)

    def copy(self, pairs):
        pairs = np.array(pairs, np.int32)
        self._cache = self._module.DECODER.copy_blocks(self._cache, pairs[:, 0], pairs[:, 1])

    def close(self):
        pass


def configuration(kind):
    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}
    if kind == "gpt2":
        return transformers.GPT2Config(n_layer=2, n_head=4, n_embd=32, n_positions=96, **common)
    common |= {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    common |= {"max_position_embeddings": 96}
    if kind == "opt":
        return transformers.OPTConfig(ffn_dim=64, dropout=0.0, **common)
    return transformers.LlamaConfig(intermediate_size=48, num_key_value_heads=2, **common)


@pytest.fixture(scope="module", params=["opt", "llama", "gpt2"])
def models(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configuration(request.param)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model, open_directory(folder)


def generate(model, prompt, **options):
    """transformers' answers, best first, each up to its end token."""
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **options}
    with torch.no_grad():
        found = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
    answers = [row[len(prompt) :] for row in found.tolist()]
    return [tuple(a[: a.index(EOS) + 1] if EOS in a else a) for a in answers]


def test_tokens_are_transformers(models):
    model, checkpoint = models
    rng = np.random.default_rng(5)
    shared = rng.integers(3, VOCABULARY, 17).tolist()
    prompts = [rng.integers(3, VOCABULARY, n).tolist() for n in (1, 5, 16, 33, 40)]
    prompts += [shared + rng.integers(3, VOCABULARY, n).tolist() for n in (1, 9)]
    greedy = Sampling(max_tokens=24, temperature=0)
    beams = Sampling(max_tokens=24, temperature=0, num_beams=3, n=3)
    core = Core(PlainRunner(checkpoint, 28), None, Options(eos=(EOS,)), Meter())
    asked = []
    for order, prompt in enumerate(prompts):
        for kind, sampling in enumerate((greedy, beams) if order in (1, 5) else (greedy,)):
            request = Request(tuple(prompt), sampling)
            asked.append((prompt, sampling, Stream(request)))
            core.add(core.job(request, asked[-1][2], 2 * order + kind))
        core.step()
    while not core.idle:
        core.step()
        core.check()
    assert core.scheduler.preemptions > 0, "there is room for all"
    for prompt, sampling, stream in asked:
        got = {}
        for piece in stream:
            got[piece.index] = got.get(piece.index, ()) + piece.token_ids
        count = sampling.num_beams
        more = {"num_beams": count, "num_return_sequences": count} if count > 1 else {}
        assert list(got.values()) == generate(model, prompt, **more), prompt
    assert core.blocks.hits >= 16
