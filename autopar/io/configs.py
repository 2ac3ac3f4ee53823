"""A Hugging Face `config.json` as one of our configs; what a model would need and we lack is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from autopar.core.errors import BadInput, UnknownName
from autopar.models import bloom, gpt2, llama, opt
from autopar.models.rope import Linear, Llama3, Rope, Scaling, Yarn
from autopar.models.serving import Serving

Settings = Mapping[str, Any]


def read_json(path: Path, needed: bool = False) -> dict[str, Any]:
    """Returns the dictionary in a JSON file, empty when there is none.

    Raises:
        BadInput: it is no JSON, no dictionary, or needed and not there.
    """
    if not path.is_file():
        if needed:
            raise BadInput(f"expected {path.name} in {path.parent}, but it is not there")
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(f"expected a dictionary in {path}, but it holds a {type(found).__name__}")
    return found


def read_config(path: Path, *, dtype: Any = jnp.float32, param_dtype: Any = None) -> Serving:
    """Returns the family and config that a `config.json` describes.

    Args:
        dtype, param_dtype: as in `get_serving`.
    Raises:
        BadInput, UnknownName: unreadable, incomplete, of another kind of model, or with an option that is
            not supported; the message names it.
    """
    settings = read_json(path, needed=True)
    kind = settings.get("model_type", "")
    if kind not in _READERS:
        raise UnknownName(f"model_type in {path},", str(kind), _READERS)
    try:
        serving = _READERS[kind](settings)
    except KeyError as error:
        raise BadInput(f"{path} lacks {error.args[0]!r}, which a {kind} needs") from None
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    param_dtype = dtype if param_dtype is None else param_dtype
    return serving._replace(config=dataclasses.replace(serving.config, dtype=dtype, param_dtype=param_dtype))


def _expect(settings: Settings, name: str, supported: Any, default: Any) -> None:
    """Raises unless an option, absent for `default`, has the only value that is built."""
    have = settings.get(name, default)
    if have != supported:
        raise BadInput(f"{name}={have!r} is not supported, only {supported!r}")


def _opt(settings: Settings) -> Serving:
    _expect(settings, "activation_function", "relu", "relu")
    _expect(settings, "enable_bias", True, True)
    _expect(settings, "layer_norm_elementwise_affine", True, True)
    _expect(settings, "_remove_final_layer_norm", False, False)
    _expect(settings, "tie_word_embeddings", True, True)
    hidden = settings["hidden_size"]
    config = opt.Config(
        layers=settings["num_hidden_layers"],
        hidden=hidden,
        heads=settings["num_attention_heads"],
        embedding=settings.get("word_embed_proj_dim", hidden),
        post_norm=not settings.get("do_layer_norm_before", True),
        vocabulary=settings.get("vocab_size", 50272),
        positions=settings.get("max_position_embeddings", 2048),
        inner=settings.get("ffn_dim", 4 * hidden),
    )
    return Serving("opt", config)


def _llama(settings: Settings, qkv_bias: bool | None = None) -> Serving:
    _expect(settings, "hidden_act", "silu", "silu")
    biased = settings.get("attention_bias", False)
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    positions = settings.get("max_position_embeddings", 2048)
    config = llama.Config(
        layers=settings["num_hidden_layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        inner=settings["intermediate_size"],
        head_size=settings.get("head_dim") or hidden // heads,
        vocabulary=settings.get("vocab_size", 32000),
        positions=positions,
        epsilon=settings.get("rms_norm_eps", 1e-6),
        rope=Rope(settings.get("rope_theta", 10000.0), _scaling(settings, positions)),
        tied=settings.get("tie_word_embeddings", False),
        qkv_bias=biased if qkv_bias is None else qkv_bias,
        out_bias=biased,
        feed_forward_bias=settings.get("mlp_bias", False),
    )
    return Serving("llama", config)


def _mistral(settings: Settings) -> Serving:
    serving = _llama(settings)
    # Up to the window's length attention through a window is attention.
    window = settings.get("sliding_window") or serving.config.positions
    positions = min(window, serving.config.positions)
    return serving._replace(config=dataclasses.replace(serving.config, positions=positions))


def _qwen2(settings: Settings) -> Serving:
    _expect(settings, "use_sliding_window", False, False)
    return _llama(settings, qkv_bias=True)


def _scaling(settings: Settings, positions: int) -> Scaling:
    """Returns how rotary positions are stretched; names as in transformers' `rope_scaling`."""
    rope = settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    original = rope.get("original_max_position_embeddings") or positions
    if kind == "default":
        return None
    if kind == "linear":
        return Linear(rope["factor"])
    if kind == "llama3":
        return Llama3(rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"], original)
    if kind == "yarn":
        _expect(rope, "truncate", True, True)
        _expect(rope, "mscale", None, None)
        attention = rope.get("attention_factor") or 0.1 * math.log(rope["factor"]) + 1.0
        return Yarn(
            rope["factor"], rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, original, attention
        )
    raise BadInput(f"rope_scaling of type {kind!r} is not supported, only linear, llama3 and yarn")


def _gpt2(settings: Settings) -> Serving:
    _expect(settings, "activation_function", "gelu_new", "gelu_new")
    _expect(settings, "scale_attn_weights", True, True)
    _expect(settings, "scale_attn_by_inverse_layer_idx", False, False)
    _expect(settings, "add_cross_attention", False, False)
    _expect(settings, "tie_word_embeddings", True, True)
    config = gpt2.Config(
        layers=settings["n_layer"],
        hidden=settings["n_embd"],
        heads=settings["n_head"],
        inner=settings.get("n_inner"),
        vocabulary=settings.get("vocab_size", 50257),
        positions=settings.get("n_positions", 1024),
        epsilon=settings.get("layer_norm_epsilon", 1e-5),
    )
    return Serving("gpt2", config)


def _bloom(settings: Settings) -> Serving:
    _expect(settings, "apply_residual_connection_post_layernorm", False, False)
    _expect(settings, "tie_word_embeddings", True, True)
    either = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "hidden_size": "n_embed"}
    layers, heads, hidden = (settings[a if a in settings else b] for a, b in either.items())
    config = bloom.Config(
        layers=layers,
        hidden=hidden,
        heads=heads,
        vocabulary=settings.get("vocab_size", 250880),
        positions=settings.get("seq_length", 2048),
        epsilon=settings.get("layer_norm_epsilon", 1e-5),
    )
    return Serving("bloom", config)


_READERS = {
    "opt": _opt,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "gpt2": _gpt2,
    "bloom": _bloom,
}
