"""Vision Transformer: an image as a sequence of patches, classified by one more token (Dosovitskiy 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from autopar.core.errors import BadInput
from autopar.models.layers import LayerNorm, cross_entropy
from autopar.models.transformer import Style, TransformerConfig, run_blocks

Array = jax.Array

STYLE = Style(causal=False, exact_gelu=True, epsilon=1e-6)


@dataclass(frozen=True, kw_only=True)
class ViTConfig(TransformerConfig):
    """Returns the description of a Vision Transformer.

    Args:
        image: side of the (square) images, in pixels. patch: side of a patch; must divide it.
        classes: outputs.
        The others are as in `TransformerConfig`.
    Raises:
        BadInput: when `heads` does not divide `hidden`, or `patch` does not divide `image`.
    """

    image: int = 32
    patch: int = 8
    classes: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image % self.patch:
            raise BadInput(f"patch={self.patch} must divide image={self.image}; choose another of the two")


class ViT(nn.Module):
    """Returns class logits, read off the first of the tokens.

    Call: `images [batch, height, width, 3] → logits [batch, classes]`.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, images: Array, deterministic: bool = True) -> Array:
        c = self.config
        side = (c.patch, c.patch)
        x = nn.Conv(c.hidden, side, side, padding="VALID", name="patches", **c.kinds)(images)
        x = x.reshape(x.shape[0], -1, c.hidden)
        near_zero = nn.initializers.normal(0.02)
        token = self.param("class", near_zero, (c.hidden,), c.param_dtype)
        token = jnp.broadcast_to(token.astype(c.dtype), (x.shape[0], 1, c.hidden))
        x = jnp.concatenate([token, x], axis=1)
        x = x + self.param("position", near_zero, x.shape[1:], c.param_dtype).astype(c.dtype)
        x = nn.Dropout(c.dropout)(x, deterministic=deterministic)
        x = run_blocks(c, STYLE, x, deterministic)
        x = LayerNorm(name="norm", epsilon=STYLE.epsilon, **c.kinds)(x[:, 0])
        return nn.Dense(c.classes, name="head", **c.kinds)(x)


def init(config: ViTConfig, key: Array) -> Any:
    """Returns random parameters for `ViT(config)`."""
    images = jax.ShapeDtypeStruct((1, config.image, config.image, 3), jnp.float32)
    return ViT(config).lazy_init(key, images)["params"]


def forward(config: ViTConfig, params: Any, images: Array) -> Array:
    """Returns the logits of `images [batch, height, width, 3]`, `[batch, classes]` in `config.dtype`."""
    return ViT(config).apply({"params": params}, images)  # type: ignore[return-value]


def loss(config: ViTConfig, params: Any, batch: dict[str, Array], key: Array | None = None) -> Array:
    """Returns the mean cross-entropy of the labels, a float32 scalar (nats).

    Args:
        params: as `init` returns them.
        batch: `images [batch, height, width, 3]` floats and `labels [batch]` integers.
        key: a PRNG key for dropout; None turns dropout off.
    """
    rngs = None if key is None else {"dropout": key}
    logits = ViT(config).apply({"params": params}, batch["images"], deterministic=key is None, rngs=rngs)
    return cross_entropy(logits, batch["labels"])  # type: ignore[arg-type]
