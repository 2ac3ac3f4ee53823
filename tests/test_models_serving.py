"""Serving steps: paged steps equal the whole forward pass, whatever is chunked, mixed or padding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autopar import models
from autopar.core.errors import BadInput, UnknownName
from autopar.models import bloom, decoder, gpt2, llama, opt, paged
from autopar.models.rope import Llama3, Rope
from autopar.models.serving import FAMILIES

VOCABULARY, BLOCK = 31, 4
MODELS = {
    "opt": (opt, opt.Config(2, 16, 2, vocabulary=VOCABULARY, positions=24)),
    "opt 350m": (opt, opt.Config(2, 16, 2, embedding=8, post_norm=True, vocabulary=VOCABULARY, positions=24)),
    "llama": (llama, llama.Config(2, 16, 4, 2, 24, vocabulary=VOCABULARY, positions=24)),
    "llama biased": (
        llama,
        llama.Config(
            2, 16, 4, 1, 24, head_size=6, vocabulary=VOCABULARY, positions=24, epsilon=1e-6,
            rope=Rope(100.0, Llama3(4.0, 1.0, 4.0, 8)),
            tied=True, qkv_bias=True, out_bias=True, feed_forward_bias=True,
        ),
    ),
    "gpt2": (gpt2, gpt2.Config(2, 16, 2, vocabulary=VOCABULARY, positions=24)),
    "bloom": (bloom, bloom.Config(2, 18, 3, vocabulary=VOCABULARY, positions=24)),
}  # fmt: skip
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def randomised(shapes, seed=0):
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [jnp.asarray(rng.normal(0.3, 0.4, x.shape), x.dtype) for x in leaves])


@functools.cache
def reference(name):
    family, config = MODELS[name]
    params = randomised(family.parameter_shapes(config))
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (3, 20))
    logits = quick_jit(functools.partial(family.forward, config))(params, jnp.asarray(tokens, jnp.int32))
    return params, tokens, np.asarray(logits)


class Driver:
    """Runs steps of rows at unlike positions; blocks are handed out in an order that is no order."""

    def __init__(self, name, blocks=24):
        self.family, self.config = MODELS[name]
        self.params, self.tokens, self.want = reference(name)
        shapes = self.family.DECODER.cache_shapes(self.config, blocks, BLOCK, jnp.float32)
        # What blocks hold before they are written must not matter.
        self.cache = jax.tree.map(lambda x: jnp.full(x.shape, 7.0), shapes)
        free = list(np.random.default_rng(2).permutation(np.arange(1, blocks)))
        self.tables = np.array([[free.pop() for _ in range(5)] for _ in range(3)])
        self.run = quick_jit(functools.partial(self.family.step, self.config), static_argnames="every")

    def step(self, rows, new, every=False):
        """Rows are (sequence, position, length); the rest of a power of two of rows is padding."""
        count = 1 << (len(rows) - 1).bit_length()
        batch = [np.zeros(s, np.int32) for s in ((count, new), count, count, (count, 5))]
        for row, (sequence, position, length) in enumerate(rows):
            batch[0][row, :length] = self.tokens[sequence, position : position + length]
            batch[1][row], batch[2][row], batch[3][row] = position, length, self.tables[sequence]
        logits, self.cache = self.run(self.params, self.cache, *map(jnp.asarray, batch), every=every)
        return np.asarray(logits)[: len(rows)]


@pytest.mark.parametrize("name", ["opt", "llama", "bloom"])
def test_a_window_beside_the_pool_gives_the_same_and_both_go_on(name):
    driver = Driver(name)
    prompts = [(0, 0, 6), (1, 0, 3), (2, 0, 8)]
    driver.step(prompts, 8)
    tables = np.concatenate([driver.tables, np.zeros((1, 5), int)])
    held = np.array([6, 3, 8, 0], np.int32)
    window = driver.family.DECODER.rows_of(driver.cache, jnp.asarray(tables), jnp.asarray(held))
    for at in range(3):
        tokens = np.array([[driver.tokens[s, n + at]] for s, _, n in prompts] + [[0]], np.int32)
        places = np.where(held > 0, held + at, 0)
        batch = map(jnp.asarray, (tokens, places, np.sign(held), tables))
        beside = tuple(map(driver.family.DECODER.Windowed, driver.cache, window))
        logits, beside = driver.run(driver.params, beside, *batch)
        want = np.stack([driver.want[s, n + at] for s, _, n in prompts])
        np.testing.assert_allclose(logits[:3], want, rtol=2e-4, atol=2e-4)
        driver.cache, window = zip(*beside)
    again = driver.step([(s, n + 3, 1) for s, _, n in prompts], 1)  # the pool has what the window has
    np.testing.assert_allclose(again, driver.want[[0, 1, 2], [9, 6, 11]], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_mixed_steps_equal_forward(name):
    driver = Driver(name)
    near = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4)
    want = driver.want
    near(driver.step([(0, 0, 6), (1, 0, 3), (2, 0, 8)], 8), want[[0, 1, 2], [5, 2, 7]])
    # A chunk of one prompt beside decode steps of the others, in another order.
    near(driver.step([(2, 8, 1), (0, 6, 1), (1, 3, 7)], 8), want[[2, 0, 1], [8, 6, 9]])
    for i in range(3):
        near(
            driver.step([(1, 10 + i, 1), (0, 7 + i, 1), (2, 9 + i, 1)], 1),
            want[[1, 0, 2], [10 + i, 7 + i, 9 + i]],
        )
    every = driver.step([(0, 10, 3), (1, 13, 4)], 4, every=True)
    near(every[0, :3], want[0, 10:13])
    near(every[1], want[1, 13:17])
    # Padding beyond the end of a full table lands in no block of the row.
    near(driver.step([(0, 13, 7)], 16), want[[0], [19]])


def test_forks_copy_a_block():
    driver = Driver("opt")
    driver.step([(0, 0, 6)], 8)
    pairs = np.array([driver.tables[0, :2], driver.tables[1, :2]], np.int32)
    driver.cache = driver.family.DECODER.copy_blocks(driver.cache, *map(jnp.asarray, pairs))
    driver.tokens = driver.tokens.copy()
    driver.tokens[1, 6] = driver.tokens[0, 6]
    np.testing.assert_allclose(driver.step([(1, 6, 1)], 1), driver.want[[0], [6]], rtol=1e-4, atol=1e-4)


def test_a_broken_sequence_poisons_no_other():
    """NaN in blocks of another sequence, or in the scratch block, reaches nobody else."""
    driver = Driver("llama")
    driver.cache = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan), driver.cache)
    have = driver.step([(0, 0, 6), (1, 0, 3), (2, 0, 8)], 8)
    np.testing.assert_allclose(have, driver.want[[0, 1, 2], [5, 2, 7]], rtol=2e-4, atol=2e-4)
    have = driver.step([(0, 6, 1), (1, 3, 1), (2, 8, 1)], 1)
    np.testing.assert_allclose(have, driver.want[[0, 1, 2], [6, 3, 8]], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", MODELS)
def test_half_precision_keeps_its_dtype(name):
    family, config = MODELS[name]
    config = dataclasses.replace(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    cache = family.DECODER.cache_shapes(config, 5, BLOCK, jnp.bfloat16)
    ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 1), (2,), (2,), (2, 3))]
    logits, new = jax.eval_shape(
        functools.partial(family.step, config), family.parameter_shapes(config), cache, *ints
    )
    assert logits.shape == (2, VOCABULARY) and logits.dtype == jnp.float32
    assert new == cache
    assert {x.dtype for x in jax.tree.leaves(family.parameter_shapes(config))} == {jnp.dtype("bfloat16")}


def test_greedy_takes_the_lowest_of_equals():
    logits = jnp.asarray([[0.0, 2.0, 2.0], [5.0, -1.0, 5.0], [jnp.nan] * 3])
    assert decoder.greedy(logits).tolist()[:2] == [1, 0]
    assert 0 <= int(decoder.greedy(logits)[2]) < 3


@pytest.mark.parametrize("heads, want", [(2, [2**-4, 2**-8]), (3, [2**-4, 2**-8, 2**-2])])
def test_slopes_are_press_et_als(heads, want):
    np.testing.assert_allclose(paged.alibi_slopes(heads), want)


# ---- names


@pytest.mark.parametrize(
    "name, count",
    [
        ("opt-125m", 125_239_296),
        ("opt-350m", 331_196_416),
        ("smollm2-135m", 134_515_008),
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama3.2-1b", 1_235_814_400),
        ("llama3.1-8b", 8_030_261_248),
        ("gpt2", 124_439_808),
        ("bloom-560m", 559_214_592),
        ("bloom-176b", 176_247_271_424),
    ],
)
def test_published_models_have_the_published_parameters(name, count):
    serving = models.get_serving(name)
    shapes = serving.module.parameter_shapes(serving.config)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_every_name_is_of_a_family():
    for name in models.serving_names():
        serving = models.get_serving(name, dtype=jnp.bfloat16)
        assert serving.module is FAMILIES[serving.family] and isinstance(
            serving.config, serving.module.Config
        )
        assert serving.config.param_dtype == jnp.bfloat16
        made = serving.module.DECODER.cache_shapes(serving.config, 3, 16, jnp.float16)
        assert len(made) == serving.config.layers


def test_bad_names_are_refused():
    with pytest.raises(UnknownName, match="opt-125m"):
        models.get_serving("opt-126m")
    with pytest.raises(BadInput, match="kv_heads"):
        models.get_serving("llama-tiny", kv_heads=3)
    with pytest.raises(BadInput, match="no 'depth'"):
        models.get_serving("gpt2", depth=3)
