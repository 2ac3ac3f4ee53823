"""Models that can be served: families by name, and published sizes of them."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any, NamedTuple

import jax.numpy as jnp

from autopar.core.errors import BadInput, UnknownName
from autopar.models import bloom, gpt2, llama, opt
from autopar.models.rope import Llama3, Rope

FAMILIES: dict[str, ModuleType] = {"opt": opt, "llama": llama, "gpt2": gpt2, "bloom": bloom}
"""Modules with `Config`, `DECODER` and its `parameter_shapes, init, forward, step`."""


class Serving(NamedTuple):
    """A model of a family: `family` is a key of `FAMILIES`, `config` a `Config` of that module."""

    family: str
    config: Any

    @property
    def module(self) -> ModuleType:
        """The family's module."""
        return FAMILIES[self.family]


def _opt(layers: int, hidden: int, heads: int, **more: Any) -> Serving:
    return Serving("opt", opt.Config(layers, hidden, heads, **more))


def _llama(layers: int, hidden: int, heads: int, kv_heads: int, inner: int, **more: Any) -> Serving:
    return Serving("llama", llama.Config(layers, hidden, heads, kv_heads, inner, **more))


def _smollm2(layers: int, hidden: int, heads: int, kv_heads: int, inner: int) -> Serving:
    return _llama(
        layers, hidden, heads, kv_heads, inner,
        vocabulary=49152, positions=8192, rope=Rope(100000.0), tied=True,
    )  # fmt: skip


def _llama3(layers: int, hidden: int, heads: int, inner: int, factor: float, **more: Any) -> Serving:
    rope = Rope(500000.0, Llama3(factor, 1.0, 4.0, 8192))
    return _llama(layers, hidden, heads, 8, inner, vocabulary=128256, positions=131072, rope=rope, **more)


def _gpt2(layers: int, hidden: int, heads: int) -> Serving:
    return Serving("gpt2", gpt2.Config(layers, hidden, heads))


def _bloom(layers: int, hidden: int, heads: int) -> Serving:
    return Serving("bloom", bloom.Config(layers, hidden, heads))


_ENTRIES: dict[str, Serving] = {
    "opt-tiny": _opt(4, 64, 4, vocabulary=256, positions=128),
    "opt-125m": _opt(12, 768, 12),
    "opt-350m": _opt(24, 1024, 16, embedding=512, post_norm=True),
    "opt-1.3b": _opt(24, 2048, 32),
    "opt-2.7b": _opt(32, 2560, 32),
    "opt-6.7b": _opt(32, 4096, 32),
    "opt-13b": _opt(40, 5120, 40),
    "opt-30b": _opt(48, 7168, 56),
    "opt-66b": _opt(64, 9216, 72),
    "opt-175b": _opt(96, 12288, 96),
    "llama-tiny": _llama(4, 64, 4, 2, 160, vocabulary=256, positions=128, tied=True),
    "smollm2-135m": _smollm2(30, 576, 9, 3, 1536),
    "smollm2-360m": _smollm2(32, 960, 15, 5, 2560),
    "tinyllama-1.1b": _llama(22, 2048, 32, 4, 5632),
    "llama-7b": _llama(32, 4096, 32, 32, 11008, positions=4096),
    "llama-13b": _llama(40, 5120, 40, 40, 13824, positions=4096),
    "llama-70b": _llama(80, 8192, 64, 8, 28672, positions=4096),
    "llama3.2-1b": _llama3(16, 2048, 32, 8192, 32.0, tied=True),
    "llama3.1-8b": _llama3(32, 4096, 32, 14336, 8.0),
    "llama3.1-70b": _llama3(80, 8192, 64, 28672, 8.0),
    "gpt2-tiny": Serving("gpt2", gpt2.Config(4, 64, 4, vocabulary=256, positions=128)),
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    "bloom-tiny": Serving("bloom", bloom.Config(4, 64, 4, vocabulary=256, positions=128)),
    "bloom-560m": _bloom(24, 1024, 16),
    "bloom-1b1": _bloom(24, 1536, 16),
    "bloom-1b7": _bloom(24, 2048, 16),
    "bloom-3b": _bloom(30, 2560, 32),
    "bloom-7b1": _bloom(30, 4096, 32),
    "bloom-176b": _bloom(70, 14336, 112),
}


def serving_names(family: str | None = None) -> tuple[str, ...]:
    """Returns the names that `get_serving` knows, by family, each from small to large."""
    return tuple(name for name, entry in _ENTRIES.items() if family in (None, entry.family))


def get_serving(name: str, *, dtype: Any = jnp.float32, param_dtype: Any = None, **changes: Any) -> Serving:
    """Returns a published model's family and config; nothing is allocated.

    Args:
        name: one of `serving_names()`.
        dtype: of activations and products.
        param_dtype: in which parameters are kept; None for `dtype`.
        changes: fields of the family's config, such as `layers=6`.
    Raises:
        UnknownName: when the name isn't in the catalogue.
        BadInput: when a change is no field of the config, or a value doesn't suit the model.
    """
    if name not in _ENTRIES:
        raise UnknownName("model", name, _ENTRIES)
    family, config = _ENTRIES[name]
    fields = {field.name for field in dataclasses.fields(config)}
    if unknown := sorted(set(changes) - fields):
        raise BadInput(f"{name} has no {unknown[0]!r}; its config has {', '.join(sorted(fields))}")
    kinds = {"dtype": dtype, "param_dtype": dtype if param_dtype is None else param_dtype}
    return Serving(family, dataclasses.replace(config, **kinds | changes))
