"""Hugging Face folders: tokens and logits equal transformers', slices read alone, errors that name things."""

import dataclasses
import functools
import json
import pickle
import shutil
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from autopar.core.errors import BadInput, UnknownName
from autopar.io.huggingface import open_directory, open_random
from autopar.io.safetensors import INDEX
from autopar.io.views import View
from autopar.io.weights import RandomWeights, by_path, read_all
from autopar.models import decoder, get_serving

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
transformers = pytest.importorskip("transformers")

BLOCK = 8
LENGTHS = (5, 1, 11, 8)
NEW = 64
QUICK = {"xla_backend_optimization_level": 0}


def tiny(kind):
    """A transformers config of two layers."""
    common = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    opt = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "ffn_dim": 64, "dropout": 0.0}
    opt |= common | {"max_position_embeddings": 96}
    llama = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 48}
    llama |= common | {"max_position_embeddings": 96}
    gpt2 = {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 96}
    bloom = {"n_layer": 2, "n_head": 4, "hidden_size": 32}
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 16}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
    return {
        "opt": lambda: transformers.OPTConfig(**opt),
        "opt 350m": lambda: transformers.OPTConfig(
            **opt | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
        ),
        "llama": lambda: transformers.LlamaConfig(**llama, num_key_value_heads=2),
        "llama tied": lambda: transformers.LlamaConfig(
            **llama, num_key_value_heads=1, tie_word_embeddings=True, rope_scaling=scaling, head_dim=16,
            attention_bias=True, mlp_bias=True,
        ),
        "llama linear": lambda: transformers.LlamaConfig(
            **llama, rope_scaling={"rope_type": "linear", "factor": 2.0}
        ),
        "llama yarn": lambda: transformers.LlamaConfig(**llama, rope_scaling=yarn),
        "mistral": lambda: transformers.MistralConfig(**llama, num_key_value_heads=2, sliding_window=None),
        "qwen2": lambda: transformers.Qwen2Config(**llama, num_key_value_heads=2),
        "gpt2": lambda: transformers.GPT2Config(**gpt2 | common),
        "bloom": lambda: transformers.BloomConfig(**bloom | common),
    }[kind]()  # fmt: skip


KINDS = ["opt", "opt 350m", "gpt2", "bloom", "mistral", "qwen2"]
KINDS += ["llama", "llama tied", "llama linear", "llama yarn"]


def save(kind, folder, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny(kind)).eval()
    with torch.no_grad():  # of order one, biases and norms too, so that a piece left out shows
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder, **options)
    return model


@functools.cache
def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(3, 97, n).tolist() for n in LENGTHS]


def theirs(model, tokens):
    """Returns transformers' logits from each prompt's last token on, with `tokens` as the answers.

    By induction answers are its greedy ones where each is the likeliest after those before it.
    """
    with torch.no_grad():
        whole = [torch.tensor([prompt + answer]) for prompt, answer in zip(prompts(), tokens)]
        return np.stack([model(t).logits[0, -NEW - 1 : -1].numpy() for t in whole])


def ours(checkpoint, options=QUICK):
    """Returns 64 greedy tokens of each prompt and the logits they were chosen by.

    The prompts go in by chunks of unlike lengths, then all rows are decoded together.
    """
    module, config = checkpoint.module, checkpoint.config
    params = read_all(checkpoint.weights, module.parameter_shapes(config))
    rows, width = len(LENGTHS), -(-(max(LENGTHS) + NEW) // BLOCK)
    pools = module.DECODER.cache_shapes(config, 1 + rows * width, BLOCK, jnp.float32)
    cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), pools)
    tables = 1 + np.random.default_rng(0).permutation(rows * width).reshape(rows, width)
    tables = jnp.asarray(tables, jnp.int32)

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=options)
    def step(cache, tokens, positions, lengths):
        logits, cache = module.step(config, params, cache, tokens, positions, lengths, tables)
        return logits, decoder.greedy(logits), cache

    done, last = np.zeros(rows, np.int32), np.zeros((rows, config.vocabulary), np.float32)
    while any(done < LENGTHS):
        lengths = np.minimum(np.asarray(LENGTHS) - done, 6).astype(np.int32)
        chunk = np.zeros((rows, 6), np.int32)
        for row, prompt in enumerate(prompts()):
            chunk[row, : lengths[row]] = prompt[done[row] : done[row] + lengths[row]]
        logits, _, cache = step(cache, chunk, done, lengths)
        last = np.where(lengths[:, None] > 0, np.asarray(logits), last)
        done = done + lengths
    tokens, kept = [last.argmax(-1)], [last]
    for i in range(NEW - 1):
        ones = np.ones(rows, np.int32)
        new = tokens[-1][:, None].astype(np.int32)
        logits, best, cache = step(cache, new, np.asarray(LENGTHS, np.int32) + i, ones)
        tokens.append(np.asarray(best))
        kept.append(np.asarray(logits))
    return np.stack(tokens, 1).tolist(), np.stack(kept, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_logits_equal_transformers(kind, tmp_path):
    model = save(kind, tmp_path)
    checkpoint = open_directory(tmp_path)
    tokens, logits = ours(checkpoint)
    want = theirs(model, tokens)
    assert tokens == want.argmax(-1).tolist()
    np.testing.assert_allclose(logits, want, atol=1e-4, rtol=0)
    assert checkpoint.eos == (2,) and checkpoint.bos == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["opt-125m", "opt-350m"])
def test_published_sizes_equal_transformers(name, tmp_path):
    config = get_serving(name).config
    torch.manual_seed(1)
    published = transformers.OPTConfig(
        num_hidden_layers=config.layers, num_attention_heads=config.heads, hidden_size=config.hidden,
        ffn_dim=4 * config.hidden, word_embed_proj_dim=config.embedding or config.hidden,
        do_layer_norm_before=not config.post_norm,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(published).eval()
    model.save_pretrained(tmp_path)
    checkpoint = open_directory(tmp_path)
    assert checkpoint.config == dataclasses.replace(
        config, embedding=config.embedding or config.hidden, inner=4 * config.hidden
    )
    tokens, logits = ours(checkpoint, options=None)
    want = theirs(model, tokens)
    assert tokens == want.argmax(-1).tolist()
    np.testing.assert_allclose(logits, want, atol=1e-4, rtol=0)


# ---- slices


def some_slices(shape, rng):
    for _ in range(4):
        cuts = [sorted(rng.integers(0, n + 1, 2)) for n in shape]
        yield tuple(slice(int(a), int(b)) for a, b in cuts)


@pytest.mark.parametrize("kind", ["opt 350m", "llama tied", "gpt2", "bloom"])
def test_slices_equal_the_whole(kind, tmp_path):
    save(kind, tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).is_file()
    weights = pickle.loads(pickle.dumps(open_directory(tmp_path).weights))
    rng = np.random.default_rng(0)
    for path, leaf in weights.shapes.items():
        whole = weights.read(path)
        assert whole.shape == leaf.shape and whole.dtype == np.float32
        for index in some_slices(leaf.shape, rng):
            np.testing.assert_array_equal(weights.read(path, index), whole[index])


class Counted:
    """Counts what is read of an array."""

    def __init__(self, array):
        self.array, self.read = array, 0

    def __getitem__(self, index):
        part = self.array[index]
        self.read += part.size
        return part


@pytest.mark.parametrize(
    "stored, pattern, shape",
    [
        ((24, 5), "(h s) d -> h s d", (6, 4, 5)),
        ((5, 72), "d (1/3 h s) -> h s d", (6, 4, 5)),
        ((72, 5), "(h 2/3 s) d -> h s d", (6, 4, 5)),
        ((24, 5), "(h s) d -> d h s", (5, 6, 4)),
        ((6, 5), "", (6, 5)),
    ],
)
def test_only_what_is_wanted_is_read(stored, pattern, shape):
    view = View("x", pattern)
    assert view.stored_shape(shape) == stored
    whole = view.read(np.arange(np.prod(stored)).reshape(stored), shape, [(0, n) for n in shape])
    for index in some_slices(shape, np.random.default_rng(1)):
        want = whole[index]
        if want.size:
            counted = Counted(np.arange(np.prod(stored)).reshape(stored))
            have = view.read(counted, shape, [(s.start, s.stop) for s in index])
            np.testing.assert_array_equal(have, want)
            assert counted.read == want.size


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_halves_are_cast_when_read(dtype, tmp_path):
    model = save("llama", tmp_path / "full")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    full = open_directory(tmp_path / "full", dtype=dtype).weights
    half = open_directory(tmp_path / "half", dtype=dtype).weights
    for path in full.shapes:
        assert full.read(path).dtype == np.dtype(dtype)
        want = full.read(path, dtype=np.float32).astype(ml_dtypes.bfloat16).astype(np.dtype(dtype))
        np.testing.assert_array_equal(half.read(path), want)


# ---- random weights


def test_random_weights_do_not_depend_on_slices():
    checkpoint = open_random("opt-125m")
    weights, other = checkpoint.weights, RandomWeights(checkpoint.weights.shapes, 1)
    rng = np.random.default_rng(0)
    for path in ("Block_3/query/kernel", "Block_3/out/kernel", "position", "Block_0/up/bias"):
        whole = weights.read(path)
        for index in some_slices(whole.shape, rng):
            np.testing.assert_array_equal(pickle.loads(pickle.dumps(weights)).read(path, index), whole[index])
        if "bias" not in path:
            assert abs(whole.std() - 0.02) < 1e-3 and abs(whole.mean()) < 1e-3
            assert (other.read(path) != whole).mean() > 0.99
            assert len(np.unique(whole)) > 0.9 * min(whole.size, 2**23)
    assert (weights.read("Block_2/query/kernel") != weights.read("Block_3/query/kernel")).mean() > 0.99
    assert (weights.read("norm/scale") == 1).all() and (weights.read("norm/bias") == 0).all()


def test_a_folder_may_have_random_weights(tmp_path):
    save("gpt2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weights = open_directory(tmp_path, random=True, seed=3).weights
    assert weights == RandomWeights(weights.shapes, 3)


# ---- what can be wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("opt")
    save("opt", folder)
    return folder


def broken(saved, tmp_path, **changes):
    """A copy of the folder whose config.json has other settings."""
    folder = tmp_path / "copy"
    shutil.copytree(saved, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "changes, error, says",
    [
        ({"model_type": "gpt_neox"}, UnknownName, "gpt_neox.*did you mean gpt2"),
        (
            {"activation_function": "gelu"},
            BadInput,
            "activation_function='gelu' is not supported, only 'relu'",
        ),
        ({"num_attention_heads": 5}, BadInput, "config.json: heads=5 must divide hidden=32"),
        ({"num_hidden_layers": 3}, BadInput, r"16 missing: model.decoder.layers.2.fc1.bias.* and 11 more"),
        ({"num_hidden_layers": 1}, BadInput, r"16 unknown: model.decoder.layers.1"),
        ({"ffn_dim": 65}, BadInput, r"fc1.weight \(64, 32\) for \(65, 32\)"),
        ({"do_layer_norm_before": False}, BadInput, r"2 unknown: model.decoder.final_layer_norm"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes, error, says, saved, tmp_path):
    with pytest.raises(error, match=says):
        open_directory(broken(saved, tmp_path, **changes))


def test_files_that_are_not_there_are_named(saved, tmp_path):
    with pytest.raises(BadInput, match="nowhere is not there"):
        open_directory(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"config\.json"):
        open_directory(tmp_path)
    folder = broken(saved, tmp_path)
    (folder / "model.safetensors").rename(folder / "other.txt")
    with pytest.raises(BadInput, match=r"no \*\.safetensors"):
        open_directory(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BadInput, match=r"pytorch_model\.bin.*run any code.*save_pretrained"):
        open_directory(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(BadInput, match=r"lacks 1 of the 1 shards in its index: model-1\.safetensors"):
        open_directory(folder)
    (folder / INDEX).write_text("{")
    with pytest.raises(BadInput, match="cannot be read as an index"):
        open_directory(folder)


def test_files_that_are_broken_are_named(saved, tmp_path):
    folder = broken(saved, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadInput, match=r"model\.safetensors cannot be read.*is it complete"):
        open_directory(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config\.json is no JSON"):
        open_directory(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "opt"}))
    with pytest.raises(BadInput, match="lacks 'hidden_size'"):
        open_directory(folder)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_unknown_stretching_is_refused(scaling, tmp_path):
    save("llama", tmp_path)
    folder = broken(tmp_path, tmp_path / "b", rope_scaling={"rope_type": scaling, "factor": 2.0})
    with pytest.raises(BadInput, match=f"rope_scaling of type '{scaling}'"):
        open_directory(folder)


def test_a_bad_index_is_refused(saved):
    weights = open_directory(saved).weights
    with pytest.raises(BadInput, match="a slice without steps"):
        weights.read("embedding", (slice(None),))
    with pytest.raises(BadInput, match="a slice without steps"):
        weights.read("embedding", (slice(0, 4, 2), slice(None)))


# ---- tokenizers


def test_vocabulary_and_merges_make_a_tokenizer(saved, tmp_path):
    folder = broken(saved, tmp_path)
    assert open_directory(folder).tokenizer is None and open_directory(folder).load_tokenizer() is None
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *alphabet, "Ġt", "Ġth", "Ġthe", "he"]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nĠ t\nĠt h\nĠth e\nh e\n")
    settings = {"add_bos_token": True, "bos_token": {"content": "</s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = open_directory(folder)
    tokenizer = checkpoint.load_tokenizer()
    reference = transformers.GPT2Tokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), bos_token="</s>", eos_token="</s>",
        unk_token="<unk>", add_bos_token=True,
    )  # fmt: skip
    for text in ("the the 12 heä\n", " the", ""):
        ids = tokenizer.encode(text).ids
        assert ids == reference(text).input_ids and ids[0] == 2
        assert tokenizer.decode(ids) == text
    assert checkpoint.eos == (2,) and checkpoint.special == {"bos_token": "</s>", "eos_token": "</s>"}
    assert checkpoint.chat_template is None


def test_chat_templates_and_ends_are_found(saved, tmp_path):
    folder = broken(saved, tmp_path)
    listed = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ messages }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": listed}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5], "temperature": 0.5}))
    checkpoint = open_directory(folder)
    assert checkpoint.chat_template == "{{ messages }}" and checkpoint.eos == (2, 5)
    assert checkpoint.generation["temperature"] == 0.5
    (folder / "chat_template.jinja").write_text("own")
    assert open_directory(folder).chat_template == "own"
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(BadInput, match=r"tokenizer\.model only"):
        open_directory(folder)


@pytest.mark.parametrize("package", ["safetensors", "tokenizers"])
def test_a_package_that_is_missing_is_named(package, saved, tmp_path, monkeypatch):
    folder = broken(saved, tmp_path)
    tokens = {"a": 0, "</s>": 1}
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=rf"needs {package}; install it: pip install .autopar\[serve\]"):
        open_directory(folder)


def test_paths_are_those_of_the_tree(saved):
    checkpoint = open_directory(saved)
    shapes = checkpoint.module.parameter_shapes(checkpoint.config)
    assert by_path(shapes) == dict(checkpoint.weights.shapes)
    tree = read_all(checkpoint.weights, shapes)
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree) == shapes
