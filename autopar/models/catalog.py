"""Built-in models by name: the ladders of Alpa's paper (Zheng et al. 2022), published models, and tiny ones.

Everything here is shapes until `init` or `make_batch` is called: `get("gpt-39b")` allocates nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from autopar.core.errors import BadInput, UnknownName
from autopar.models import bert, families, gpt, layers, llama, mlp, moe, opt, unet, vit, wide_resnet
from autopar.models.families import Family
from autopar.models.paged import Cache
from autopar.models.serving import get_serving, serving_names
from autopar.models.step import ModelStep, adamw, count_parameters, init_state, train_step

Array = jax.Array


DECODE_BLOCK = 16
"""Tokens in a KV block of `get_decode`."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One name: a family, a size, and the batch, sequence (None where there is none) and dtype to use."""

    family: Family
    config: Any
    batch: int
    sequence: int | None
    dtype: Any


class DecodeInput(NamedTuple):
    """What a decode step reads beside the parameters; see `autopar.models.decoder.Decoder.step`."""

    cache: Cache
    tokens: Array
    positions: Array
    lengths: Array
    tables: Array


def _gpt(hidden: int, layers: int, heads: int) -> Entry:
    config = gpt.GPTConfig(vocabulary=51200, positions=1024, layers=layers, hidden=hidden, heads=heads)
    return Entry(families.GPT, config, 1024, 1024, jnp.float16)


def _moe(hidden: int, layers: int, experts: int) -> Entry:
    config = moe.MoEConfig(
        vocabulary=32000, positions=1024, layers=layers, hidden=hidden, heads=16, experts=experts
    )
    return Entry(families.MOE, config, 1024, 1024, jnp.float16)


def _wide_resnet(layers: int, channels: int, width: int) -> Entry:
    config = wide_resnet.WideResNetConfig(wide_resnet.BLOCKS[layers], channels, width)
    return Entry(families.WIDE_RESNET, config, 1536, None, jnp.float32)


def _bert(hidden: int, layers: int, heads: int) -> Entry:
    config = bert.BERTConfig(vocabulary=30522, positions=512, layers=layers, hidden=hidden, heads=heads)
    return Entry(families.BERT, config, 256, 512, jnp.float16)


def _vit(hidden: int, layers: int, heads: int) -> Entry:
    config = vit.ViTConfig(image=224, patch=16, classes=1000, layers=layers, hidden=hidden, heads=heads)
    return Entry(families.VIT, config, 4096, None, jnp.float16)


def _unet(image: int, multipliers: tuple[int, ...], batch: int) -> Entry:
    config = unet.UNetConfig(image=image, channels=128, multipliers=multipliers, blocks=2, attention=(16,))
    return Entry(families.UNET, config, batch, None, jnp.float32)


def _llama(name: str, sequence: int = 2048, dtype: Any = jnp.float16) -> Entry:
    return Entry(families.LLAMA, get_serving(name).config, 512, sequence, dtype)


def _opt(name: str, sequence: int = 512, dtype: Any = jnp.float16) -> Entry:
    return Entry(families.OPT, get_serving(name).config, 8, sequence, dtype)


_TINY_RESNET = wide_resnet.WideResNetConfig(
    channels=16, classes=16, image=32, norm=functools.partial(layers.group_norm, 8)
)

_ENTRIES: dict[str, Entry] = {
    "gpt-350m": _gpt(1024, 24, 16),
    "gpt-1.3b": _gpt(2048, 24, 32),
    "gpt-2.6b": _gpt(2560, 32, 32),
    "gpt-6.7b": _gpt(4096, 32, 32),
    "gpt-15b": _gpt(5120, 48, 40),
    "gpt-39b": _gpt(8192, 48, 64),
    "moe-380m": _moe(768, 8, 8),
    "moe-690m": _moe(768, 8, 16),
    "moe-1.3b": _moe(768, 16, 16),
    "moe-2.4b": _moe(1024, 16, 16),
    "moe-10b": _moe(1536, 16, 32),
    "moe-27b": _moe(2048, 16, 48),
    "moe-70b": _moe(2048, 32, 64),
    "wresnet-250m": _wide_resnet(50, 160, 2),
    "wresnet-500m": _wide_resnet(50, 224, 2),
    "wresnet-1b": _wide_resnet(50, 320, 2),
    "wresnet-2b": _wide_resnet(50, 448, 2),
    "wresnet-4b": _wide_resnet(50, 640, 2),
    "wresnet-6.8b": _wide_resnet(50, 320, 16),
    "wresnet-13b": _wide_resnet(101, 320, 16),
    **{name: _opt(name) for name in serving_names("opt") if name != "opt-tiny"},
    "bert-base": _bert(768, 12, 12),
    "bert-large": _bert(1024, 24, 16),
    "vit-b16": _vit(768, 12, 12),
    "vit-l16": _vit(1024, 24, 16),
    "unet-ddpm-32": _unet(32, (1, 2, 2, 2), 128),
    "unet-ddpm-256": _unet(256, (1, 1, 2, 2, 4, 4), 64),
    **{name: _llama(name) for name in serving_names("llama") if name != "llama-tiny"},
    "bert-tiny": Entry(families.BERT, bert.BERTConfig(), 8, 32, jnp.float32),
    "vit-tiny": Entry(families.VIT, vit.ViTConfig(), 8, None, jnp.float32),
    "unet-tiny": Entry(families.UNET, unet.UNetConfig(), 8, None, jnp.float32),
    "llama-tiny": dataclasses.replace(_llama("llama-tiny", 32, jnp.float32), batch=8),
    "gpt-tiny": Entry(families.GPT, gpt.GPTConfig(), 8, 32, jnp.float32),
    "moe-tiny": Entry(families.MOE, moe.MoEConfig(), 8, 32, jnp.float32),
    "wresnet-tiny": Entry(families.WIDE_RESNET, _TINY_RESNET, 8, None, jnp.float32),
    "opt-tiny": _opt("opt-tiny", 32, jnp.float32),
    "mlp": Entry(families.MLP, mlp.MLPConfig(), 8, None, jnp.float32),
}


def names() -> tuple[str, ...]:
    """Returns the names that `get` knows, ladders first, each from small to large."""
    return tuple(_ENTRIES)


def get(
    name: str,
    *,
    batch: int | None = None,
    sequence: int | None = None,
    dtype: Any = None,
    training: bool | None = None,
    value_and_grad: Callable[..., Any] = jax.value_and_grad,
    **changes: Any,
) -> ModelStep:
    """Returns the step of a built-in model; nothing is allocated.

    Training: AdamW with clipping by global norm on float32 parameters and moments, products in `dtype`. There
    is no loss scaling: to train rather than plan, prefer bfloat16 or float32 to the ladders' float16.
    Forward: logits from parameters kept in `dtype`.

    Args:
        name: one of `names()`.
        batch: examples per step; None for the ladder's (1024 for gpt and moe, 1536 for wresnet, 8 for opt).
        sequence: tokens per example; None for the ladder's (1024; 512 for opt).
        dtype: of activations and products; None for the ladder's (float16; float32 for wresnet and the tiny).
        training: a train step, or a forward step; None for a train step, but forward for opt.
        value_and_grad: `jax.value_and_grad` or a drop-in for it.
        changes: fields of the model's config, such as `layers=6`, `scan_layers=True`, `dropout=0.1`.
    Raises:
        UnknownName: when the name isn't in the catalogue.
        BadInput: when a change is no field of the config, or an argument doesn't suit the model.
    """
    entry = _lookup(name)
    family, batch = entry.family, _positive("batch", batch, entry.batch)
    training = family.training if training is None else training
    dtype = entry.dtype if dtype is None else dtype
    sequence = _sequence(name, entry, sequence)
    kinds = {"dtype": dtype, "param_dtype": jnp.float32 if training else dtype}
    config = _configure(name, entry.config, sequence, kinds | changes)
    random_batch = functools.partial(family.make_batch, config, batch=batch, sequence=sequence)
    of = "" if sequence is None else f" of {sequence} tokens"
    if training:
        step, init = _train(family, config, value_and_grad)
        title = f"{family.title} train step, batch {batch}{of}"
        return _model_step(name, step, init, random_batch, batch, title)
    step, init = _forward(family, config)
    title = f"{family.title} forward step, batch {batch}{of}"
    return _model_step(name, step, init, lambda key: random_batch(key)[family.inputs], batch, title)


def get_decode(
    name: str, *, batch: int = 8, length: int = 1024, dtype: Any = None, **changes: Any
) -> ModelStep:
    """Returns the decode step of a built-in OPT: `(params, DecodeInput) → (logits, cache)`, as shapes.

    Args:
        name: an opt of `names()`.
        batch: sequences decoded together.
        length: tokens the cache holds per sequence.
        dtype: of parameters, cache and products; None for the ladder's float16.
        changes: as in `get`.
    Raises:
        UnknownName, BadInput: as in `get`; BadInput for a model without a decode step.
    """
    entry = _lookup(name)
    if entry.family is not families.OPT:
        raise BadInput(
            f"{name} has no decode step; choose one of {', '.join(n for n in names() if 'opt' in n)}"
        )
    dtype = entry.dtype if dtype is None else dtype
    batch, length = _positive("batch", batch, batch), _positive("length", length, length)
    config = _configure(name, entry.config, length, {"dtype": dtype, "param_dtype": dtype} | changes)
    blocks = -(-length // DECODE_BLOCK)

    def step(params: opt.Params, inputs: DecodeInput) -> tuple[Array, Cache]:
        return opt.step(config, params, *inputs)

    def make_batch(key: Array) -> DecodeInput:
        tokens = jax.random.randint(key, (batch, 1), 0, config.vocabulary, jnp.int32)
        shapes = opt.DECODER.cache_shapes(config, 1 + batch * blocks, DECODE_BLOCK, dtype)
        cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        tables = 1 + jnp.arange(batch * blocks, dtype=jnp.int32).reshape(batch, blocks)
        return DecodeInput(cache, tokens, jnp.zeros(batch, jnp.int32), jnp.ones(batch, jnp.int32), tables)

    title = f"OPT decode step, batch {batch}, cache of {length} tokens"
    return _model_step(name, step, functools.partial(opt.init, config), make_batch, batch, title)


def _train(family: Family, config: Any, value_and_grad: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the train step and what makes its state."""
    optimizer = adamw()
    dropout = getattr(config, "dropout", 0.0) > 0

    def init(key: Array) -> Any:
        return init_state(functools.partial(family.init, config), optimizer, key, dropout)

    return train_step(functools.partial(family.loss, config), optimizer, value_and_grad), init


def _forward(family: Family, config: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns the forward step and what makes its parameters."""

    def step(params: Any, inputs: Array) -> Array:
        return family.forward(config, params, inputs)

    return step, functools.partial(family.init, config)


def _model_step(name: str, step: Any, init: Any, make_batch: Any, batch: int, title: str) -> ModelStep:
    key = jax.eval_shape(lambda: jax.random.key(0))
    args = jax.eval_shape(init, key), jax.eval_shape(make_batch, key)
    parameters = count_parameters(getattr(args[0], "params", args[0]))
    title = f"{title}, {_short(parameters)} parameters"
    return ModelStep(name, step, args, init, make_batch, batch, parameters, title)


def _short(count: int) -> str:
    for unit, scale in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return str(count)


def _lookup(name: str) -> Entry:
    if name not in _ENTRIES:
        raise UnknownName("model", name, _ENTRIES)
    return _ENTRIES[name]


def _positive(what: str, value: int | None, default: int) -> int:
    value = default if value is None else value
    if value < 1:
        raise BadInput(f"{what} must be at least 1, but got {value}")
    return value


def _sequence(name: str, entry: Entry, sequence: int | None) -> int | None:
    if entry.sequence is None:
        if sequence is not None:
            raise BadInput(f"{name} reads no sequence, but got sequence={sequence}; leave it out")
        return None
    return _positive("sequence", sequence, entry.sequence)


def _configure(name: str, config: Any, sequence: int | None, changes: dict[str, Any]) -> Any:
    """Returns `config` with `changes`; a position table that can grow reaches at least to `sequence`."""
    fields = {field.name for field in dataclasses.fields(config)}
    for change in changes:
        if change not in fields:
            raise BadInput(f"{name} has no {change!r}; its config has {', '.join(sorted(fields))}")
    config = dataclasses.replace(config, **changes)
    if sequence is None or sequence <= config.positions or "positions" in changes:
        return config
    if isinstance(config, (opt.OPTConfig, llama.LlamaConfig, bert.BERTConfig)):
        raise BadInput(f"{name} has {config.positions} positions, but got a sequence of {sequence}")
    return dataclasses.replace(config, positions=sequence)
