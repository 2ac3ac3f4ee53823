"""Names of tensors in Hugging Face files, a table per family: our path → their name and how it lies there."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from autopar.io.views import View

ROWS = "(h s) d -> h s d"
ROWS_BIAS = "(h s) -> h s"
COLUMNS = "d (h s) -> d h s"


@dataclass(frozen=True)
class Names:
    """How one family's files are named.

    Attributes:
        prefixes: what may stand before the names of `block` and `body`, the usual first.
        anchor: path of a leaf that every file of the family has; it tells which prefix is used.
        block: leaves of `Block_i`, by their paths in it; `{i}` in a name is the layer.
        body: leaves beside the blocks. head: those without a prefix.
        ignored: patterns of tensors that hold nothing new (masks, a tied head).
    """

    prefixes: tuple[str, ...]
    anchor: str
    block: Mapping[str, View]
    body: Mapping[str, View]
    head: Mapping[str, View]
    ignored: tuple[str, ...]

    def view(self, path: str, prefix: str = "") -> View:
        """Returns how the leaf at `path` lies in a file."""
        if path in self.head:
            return self.head[path]
        if path in self.body:
            view = self.body[path]
            return View(prefix + view.tensor, view.pattern)
        block, rest = path.split("/", 1)
        view = self.block[rest]
        return View(prefix + view.tensor.format(i=block.removeprefix("Block_")), view.pattern)

    def ignores(self, tensor: str) -> bool:
        """Returns whether a tensor that no leaf reads may be there."""
        return any(fnmatch.fnmatchcase(tensor, pattern) for pattern in self.ignored)


def _affine(path: str, tensor: str, kernel: str = "", bias: str = "") -> dict[str, View]:
    return {
        f"{path}/kernel": View(f"{tensor}.weight", kernel),
        f"{path}/bias": View(f"{tensor}.bias", bias),
    }


def _norm(path: str, tensor: str) -> dict[str, View]:
    return {f"{path}/scale": View(f"{tensor}.weight"), f"{path}/bias": View(f"{tensor}.bias")}


def _fused(tensor: str, kernel: str, bias: str) -> dict[str, View]:
    """Query, key and value are parts 0, 1 and 2 of one tensor; `P` in a pattern stands for the part."""
    parts = enumerate(("query", "key", "value"))
    made = [_affine(n, tensor, kernel.replace("P", f"{i}/3"), bias.replace("P", f"{i}/3")) for i, n in parts]
    return made[0] | made[1] | made[2]


OPT = Names(
    prefixes=("model.decoder.", "decoder."),
    anchor="embedding",
    block=_norm("norm_attention", "layers.{i}.self_attn_layer_norm")
    | _affine("query", "layers.{i}.self_attn.q_proj", ROWS, ROWS_BIAS)
    | _affine("key", "layers.{i}.self_attn.k_proj", ROWS, ROWS_BIAS)
    | _affine("value", "layers.{i}.self_attn.v_proj", ROWS, ROWS_BIAS)
    | _affine("out", "layers.{i}.self_attn.out_proj", COLUMNS)
    | _norm("norm_feed_forward", "layers.{i}.final_layer_norm")
    | _affine("up", "layers.{i}.fc1")
    | _affine("down", "layers.{i}.fc2"),
    body={
        "embedding": View("embed_tokens.weight"),
        "position": View("embed_positions.weight"),
        "project_in": View("project_in.weight"),
        "project_out": View("project_out.weight"),
    }
    | _norm("norm", "final_layer_norm"),
    head={},
    ignored=("lm_head.weight", "model.decoder.version"),
)

LLAMA = Names(
    prefixes=("model.", ""),
    anchor="embedding",
    block={
        "norm_attention/scale": View("layers.{i}.input_layernorm.weight"),
        "norm_feed_forward/scale": View("layers.{i}.post_attention_layernorm.weight"),
    }
    | _affine("query", "layers.{i}.self_attn.q_proj", ROWS, ROWS_BIAS)
    | _affine("key", "layers.{i}.self_attn.k_proj", ROWS, ROWS_BIAS)
    | _affine("value", "layers.{i}.self_attn.v_proj", ROWS, ROWS_BIAS)
    | _affine("out", "layers.{i}.self_attn.o_proj", COLUMNS)
    | _affine("gate", "layers.{i}.mlp.gate_proj")
    | _affine("up", "layers.{i}.mlp.up_proj")
    | _affine("down", "layers.{i}.mlp.down_proj"),
    body={"embedding": View("embed_tokens.weight"), "norm/scale": View("norm.weight")},
    head={"head": View("lm_head.weight")},
    ignored=("*.rotary_emb.inv_freq", "lm_head.weight"),
)

GPT2 = Names(
    # GPT-2's own products are x · W: its kernels are stored [in, out].
    prefixes=("transformer.", ""),
    anchor="embedding",
    block=_norm("norm_attention", "h.{i}.ln_1")
    | _fused("h.{i}.attn.c_attn", "d (P h s) -> h s d", "(P h s) -> h s")
    | _affine("out", "h.{i}.attn.c_proj", "(h s) d -> d h s")
    | _norm("norm_feed_forward", "h.{i}.ln_2")
    | _affine("up", "h.{i}.mlp.c_fc", "i o -> o i")
    | _affine("down", "h.{i}.mlp.c_proj", "i o -> o i"),
    body={"embedding": View("wte.weight"), "position": View("wpe.weight")} | _norm("norm", "ln_f"),
    head={},
    ignored=("lm_head.weight", "*.attn.bias", "*.attn.masked_bias"),
)

BLOOM = Names(
    prefixes=("transformer.", ""),
    anchor="embedding",
    block=_norm("norm_attention", "h.{i}.input_layernorm")
    | _fused("h.{i}.self_attention.query_key_value", "(h P s) d -> h s d", "(h P s) -> h s")
    | _affine("out", "h.{i}.self_attention.dense", COLUMNS)
    | _norm("norm_feed_forward", "h.{i}.post_attention_layernorm")
    | _affine("up", "h.{i}.mlp.dense_h_to_4h")
    | _affine("down", "h.{i}.mlp.dense_4h_to_h"),
    body={"embedding": View("word_embeddings.weight")}
    | _norm("norm_embedding", "word_embeddings_layernorm")
    | _norm("norm", "ln_f"),
    head={},
    ignored=("lm_head.weight",),
)

NAMES = {"opt": OPT, "llama": LLAMA, "gpt2": GPT2, "bloom": BLOOM}
