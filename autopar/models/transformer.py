"""The stack of like blocks that GPT, BERT and ViT are made of (Vaswani et al. 2017)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from autopar.models.decoder import check_heads
from autopar.models.layers import Attention, FeedForward, LayerNorm

Array = jax.Array


@dataclass(frozen=True)
class Style:
    """What tells the blocks of one kind of transformer from another's.

    Attributes:
        causal: a position sees only itself and those before it.
        post_norm: what attention and feed-forward add is normalised with what they read, not before them.
        exact_gelu: the GELU of the error function rather than its tanh approximation.
        epsilon: of the norms.
    """

    causal: bool = True
    post_norm: bool = False
    exact_gelu: bool = False
    epsilon: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Returns the sizes of a stack of blocks.

    Args:
        layers: number of blocks.
        hidden: width of the residual stream; a block's inner width is four times that.
        heads: attention heads; must divide `hidden`.
        dtype: dtype of activations and products.
        param_dtype: dtype in which parameters are kept.
        dropout: rate on attention weights and on what each half of a block adds.
        scan_layers: one `lax.scan` over stacked parameters instead of `layers` separate blocks.
        remat: recompute each block in the backward pass instead of keeping what is inside it.
    Raises:
        BadInput: when `heads` does not divide `hidden`.
    """

    layers: int = 4
    hidden: int = 64
    heads: int = 4
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    dropout: float = 0.0
    scan_layers: bool = False
    remat: bool = False

    def __post_init__(self) -> None:
        check_heads(self.hidden, self.heads)

    @property
    def kinds(self) -> dict[str, Any]:
        """The two dtypes, as modules take them."""
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}


class Block(nn.Module):
    """Returns x + attention(norm(x)), then + feed_forward(norm(x)); post-norm: norm(x + attention(x)), ….

    Call: `x [batch, time, hidden]` → the same shape.
    """

    config: TransformerConfig
    style: Style

    @nn.compact
    def __call__(self, x: Array, deterministic: bool) -> Array:
        c, style = self.config, self.style

        def add(x: Array, norm: str, f: Callable[[Array], Array]) -> Array:
            normalise = LayerNorm(name=norm, epsilon=style.epsilon, **c.kinds)
            y = nn.Dropout(c.dropout)(f(x if style.post_norm else normalise(x)), deterministic=deterministic)
            return normalise(x + y) if style.post_norm else x + y

        attention = Attention(c.heads, dropout=c.dropout, causal=style.causal, name="attention", **c.kinds)
        x = add(x, "norm_attention", lambda y: attention(y, deterministic))
        feed_forward = FeedForward(4 * c.hidden, exact=style.exact_gelu, name="feed_forward", **c.kinds)
        return add(x, "norm_feed_forward", feed_forward)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _block(config: TransformerConfig, style: Style, params: Any, x: Array) -> Array:
    """A block without dropout as a function of its parameters: like blocks are traced once."""
    return Block(config, style, parent=None).apply({"params": params}, x, True)  # type: ignore[return-value]


def run_blocks(config: TransformerConfig, style: Style, x: Array, deterministic: bool) -> Array:
    """Returns `x` after all blocks; creates their modules in the module that is being called.

    They are named `Block_0`, `Block_1`, …, or `Blocks` when scanned.
    """
    block = (
        nn.remat(Block, static_argnums=(2,), prevent_cse=not config.scan_layers) if config.remat else Block
    )
    if not config.scan_layers:
        for i in range(config.layers):
            module = block(config, style, name=f"Block_{i}")
            if config.remat or not deterministic or module.is_initializing():
                x = module(x, deterministic)
            else:
                with jax.named_scope(f"Block_{i}"):
                    x = _block(config, style, module.variables["params"], x)
        return x
    scanned = nn.scan(
        lambda module, carry, _: (module(carry, deterministic), None),
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=config.layers,
    )
    return scanned(block(config, style, name="Blocks"), x, None)[0]
