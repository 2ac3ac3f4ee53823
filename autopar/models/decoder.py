"""What the decoders that are served have in common: the walk through their layers, products and norms.

A model is a `Decoder`, four functions; its `forward` reads whole sequences with them and `step` goes on with
sequences whose keys and values are in blocks. Served layers are unrolled, each with its own weights: a scan
would copy weight slices and the cache at every step; `forward` scans where weights are stacked. Weights are
kept as `[out, in]`: a product is `weight · x`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from autopar.core.errors import BadInput
from autopar.models import paged
from autopar.models.layers import cross_entropy
from autopar.models.paged import Cache, LayerCache, Slots, Windowed, attention, causal, last_tokens, slots

Array = jax.Array
Params = dict[str, Any]


class Mix(Protocol):
    """What a block knows of the other tokens."""

    def __call__(self, query: Array, key: Array, value: Array, slopes: Any = None) -> tuple[Array, Any]:
        """Returns what the tokens asked for gather, and a layer's cache with the new keys and values.

        Args:
            query: of the tokens asked for. key, value: of all. slopes: as in `paged.attention`.
        """
        ...

    def asked(self, x: Array) -> Array:
        """Returns the part of `[rows, new, …]` that a block's result is wanted of.

        All, or each row's last token: of a prompt only the last logits are looked at, so all that the last
        block does for the other tokens is their keys and values.
        """
        ...


MANY = 128
"""Tokens from which on they are the left operand of a product.

On a CPU a product of few tokens reads a weight as it lies if that is on the left, and is up to a quarter
quicker; for many that costs more in transposed activations than it gains.
"""

STACKED = "Blocks"
"""What the parameters of all blocks are called where they are stacked, for one scan over them."""


class Decoder(NamedTuple):
    """A decoder in four functions; what is done with it follows from them.

    Attributes:
        parameter_shapes: `config → params` as `jax.ShapeDtypeStruct`s.
        embed: `(config, params, tokens, positions) → x`, all `[rows, new]`, x `[rows, new, hidden]`.
        block: `(config, params["Block_i"], x, positions, mix) → (x, cache)`, x of the tokens that
            `mix.asked` keeps, cache as `mix` gave it.
        head: `(config, params, x) → logits`, `[…, vocabulary]` in the dtype of x.
    """

    parameter_shapes: Callable[[Any], Params]
    embed: Callable[..., Array]
    block: Callable[..., tuple[Array, Any]]
    head: Callable[..., Array]

    # Where a layer's keys and values are kept: the same for all decoders.
    Windowed = Windowed
    cache_shapes = staticmethod(paged.cache_shapes)
    copy_blocks = staticmethod(paged.copy_blocks)
    rows_of = staticmethod(paged.rows_of)

    def init(self, config: Any, key: Array) -> Params:
        """Returns random parameters (normal, standard deviation 0.02), named as in `parameter_shapes`."""
        return normal_init(self.parameter_shapes(config), key)

    def forward(self, config: Any, params: Params, tokens: Array) -> Array:
        """Returns the logits of every position, `[batch, time, vocabulary]` in `config.dtype`.

        Args:
            tokens: `[batch, time]` integers, time at most `config.positions`.
        """
        check_length(config.positions, tokens.shape[1])
        positions = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
        x = _embed(self, config, params, tokens, positions)

        def block(x: Array, layer: Params) -> tuple[Array, None]:
            return self.block(config, layer, x, positions, _Causal())[0], None

        if STACKED in params:
            with jax.named_scope(STACKED):
                x, _ = jax.lax.scan(block, x, params[STACKED])
        else:
            for i in range(config.layers):
                with jax.named_scope(f"Block_{i}"):
                    x, _ = block(x, params[f"Block_{i}"])
        return _head(self, config, params, x)

    def step(
        self,
        config: Any,
        params: Params,
        cache: Cache,
        tokens: Array,
        positions: Array,
        lengths: Array,
        tables: Array,
        every: bool = False,
    ) -> tuple[Array, Cache]:
        """Returns the logits after each row's last real token, and the cache with the new tokens in it.

        Args:
            cache: pools as in `cache_shapes`; what a row's blocks hold from its position on is ignored.
                Or a `Windowed` per layer; a window's rows are those of the step, its tables those of
                the pool beside it.
            tokens: int32 `[rows, new]`.
            positions: int32 `[rows]`, index of each row's first new token in its sequence.
            lengths: int32 `[rows]`, how many of a row's new tokens are real, 0 for a row that is padding.
            tables: int32 `[rows, blocks]`, the blocks of a row in order, `SCRATCH` beyond its end.
            every: give the logits of all new tokens instead.
        Returns:
            float32 `[rows, vocabulary]` (`[rows, new, vocabulary]` for `every`), and the new cache.
        """
        if STACKED in params:
            raise BadInput("a model with scan_layers=True is for training; serve it with scan_layers=False")
        where = slots(cache, tokens, positions, lengths, tables)
        x = _embed(self, config, params, tokens, jnp.minimum(where.positions, config.positions - 1))

        @partial(jax.jit, static_argnums=4)  # traced once for most layers: a deep model is planned sooner
        def block(
            params: Params, x: Array, layer: LayerCache | Windowed, where: Slots, narrows: bool
        ) -> tuple[Array, LayerCache | Windowed | None]:
            return self.block(config, params, x, where.positions, _Paged(layer, where, narrows))

        layers = []
        for i, layer in enumerate(cache):
            narrows = not every and i == config.layers - 1
            with jax.named_scope(f"Block_{i}"):
                x, layer = block(params[f"Block_{i}"], x, layer, where, narrows)
            layers.append(layer)
        logits = _head(self, config, params, x).astype(jnp.float32)
        return logits if every else logits[:, 0], tuple(layers)

    def loss(self, config: Any, params: Params, batch: dict[str, Array], key: Array | None = None) -> Array:
        """Returns the mean next-token cross-entropy (nats); `batch` as in `gpt.loss`, `key` is unused."""
        return cross_entropy(self.forward(config, params, batch["tokens"]), batch["targets"])


class _Paged(NamedTuple):
    """The `Mix` of one layer of a step; `narrows`: only each row's last token is asked for."""

    cache: LayerCache | Windowed
    where: Slots
    narrows: bool

    def __call__(self, *args: Any, **more: Any) -> tuple[Array, LayerCache | Windowed]:
        return attention(self.cache, self.where, *args, **more)

    def asked(self, x: Array) -> Array:
        return last_tokens(x, self.where) if self.narrows else x


class _Causal:
    """The `Mix` of whole sequences."""

    def __call__(self, *args: Any, **more: Any) -> tuple[Array, None]:
        return causal(*args, **more), None

    def asked(self, x: Array) -> Array:
        return x


def _embed(decoder: Decoder, *args: Any) -> Array:
    with jax.named_scope("embedding"):
        return decoder.embed(*args)


def _head(decoder: Decoder, *args: Any) -> Array:
    with jax.named_scope("head"):
        return decoder.head(*args)


def greedy(logits: Array) -> Array:
    """Returns the likeliest token of each row, int32 `[rows]`, the lowest id among equals.

    Two plain passes, the largest value and then the first place that has it: XLA's argmax carries pairs
    through one pass, which is several times slower on a CPU and gathers a split vocabulary on a mesh.

    Args:
        logits: float32 `[rows, vocabulary]`.
    """
    vocabulary = logits.shape[-1]
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    best = jnp.max(logits, axis=-1, keepdims=True)
    # Where all are NaN no place equals the largest: say the last id rather than one that is none.
    return jnp.minimum(jnp.min(jnp.where(logits == best, ids, vocabulary), axis=-1), vocabulary - 1)


def take(table: Array, ids: Array, dtype: Any) -> Array:
    """Returns rows of an embedding table, `[…, width]` in `dtype`."""
    return jnp.take(table, ids, axis=0, mode="clip").astype(dtype)


def linear(params: Params, x: Array, inputs: int = 1) -> Array:
    """Returns weight · x (+ bias): `[…, in] → […, out]`.

    Args:
        params: "kernel" `[out…, in…]`, of any number of dims out, and perhaps "bias" `[out…]`.
        inputs: how many dims in there are.
    """
    y = product(params["kernel"], x, inputs)
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def product(weight: Array | Params, x: Array, inputs: int = 1) -> Array:
    """Returns weight · x over the last `inputs` dims of both, the dims of `x` first, in the dtype of `x`.

    A weight may be in int8 with a scale per channel, as in `int8.py`.
    """
    if isinstance(weight, dict):
        y = _product(weight["int8"], x, inputs, jnp.float32)
        return (y * weight["scale"]).astype(x.dtype)
    return _product(weight, x, inputs, x.dtype)


def _product(weight: Array, x: Array, inputs: int, dtype: Any) -> Array:
    tokens, outer = x.ndim - inputs, weight.ndim - inputs
    rows, out = x.shape[:tokens], weight.shape[:outer]
    if math.prod(rows) >= MANY:
        # as matrices: XLA would transpose a right operand of more dims at every step
        weight, x = weight.reshape(math.prod(out), -1), x.reshape(*rows, -1)
        y = jax.lax.dot_general(x, weight, (((tokens,), (1,)), ((), ())), preferred_element_type=dtype)
        return y.reshape(*rows, *out)
    over = tuple(range(outer, weight.ndim)), tuple(range(tokens, x.ndim))
    y = jax.lax.dot_general(weight, x, (over, ((), ())), preferred_element_type=dtype)
    return y.transpose(*range(outer, y.ndim), *range(outer))


def layer_norm(params: Params, x: Array, epsilon: float = 1e-5) -> Array:
    """Returns x normalised over its last dim, in float32, scaled and shifted; in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * params["scale"] + params["bias"]).astype(x.dtype)


def rms_norm(params: Params, x: Array, epsilon: float) -> Array:
    """Returns x over its root mean square, in float32, scaled (Zhang & Sennrich 2019)."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + epsilon)
    return (wide * params["scale"]).astype(x.dtype)


def block_shapes(hidden: int, heads: int, inner: int, dtype: Any) -> Params:
    """Returns the parameters of a block with norms, biases and four kernels of attention, two beyond it.

    Kernels are `[out, in]`, with heads and their size apart: `[heads, size, hidden]` of a query.
    """

    def leaf(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    size = hidden // heads
    norm = {"scale": leaf(hidden), "bias": leaf(hidden)}
    split = {"kernel": leaf(heads, size, hidden), "bias": leaf(heads, size)}
    return {
        "norm_attention": dict(norm),
        "query": dict(split),
        "key": dict(split),
        "value": dict(split),
        "out": {"kernel": leaf(hidden, heads, size), "bias": leaf(hidden)},
        "norm_feed_forward": dict(norm),
        "up": {"kernel": leaf(inner, hidden), "bias": leaf(inner)},
        "down": {"kernel": leaf(hidden, inner), "bias": leaf(hidden)},
    }


def norm_shapes(hidden: int, dtype: Any) -> Params:
    """Returns the parameters of a layer norm."""
    return {"scale": jax.ShapeDtypeStruct((hidden,), dtype), "bias": jax.ShapeDtypeStruct((hidden,), dtype)}


def stacked(params: Params, layers: int) -> Params:
    """Returns shapes of `Block_0`, `Block_1`, … as one `Blocks`, with the layers as first dim."""
    rest = {name: shape for name, shape in params.items() if not name.startswith("Block_")}
    stack = jax.tree.map(lambda x: jax.ShapeDtypeStruct((layers, *x.shape), x.dtype), params["Block_0"])
    return rest | {STACKED: stack}


def check_heads(hidden: int, heads: int) -> None:
    """Raises BadInput unless `heads` divides `hidden`."""
    if hidden % heads:
        raise BadInput(f"heads={heads} must divide hidden={hidden}; choose another of the two")


def check_length(positions: int, length: int) -> None:
    """Raises BadInput when there are fewer positions than tokens."""
    if length > positions:
        raise BadInput(f"a length of {length} tokens, but the model has {positions} positions")


def normal_init(shapes: Params, key: Array) -> Params:
    """Returns random parameters: norms' scales one, biases zero, the rest normal of deviation 0.02."""
    leaves, tree = jax.tree.flatten_with_path(shapes)
    keys = jax.random.split(key, len(leaves))
    made = []
    for (path, leaf), leaf_key in zip(leaves, keys):
        name = path[-1].key
        if name == "int8":
            made.append(jax.random.randint(leaf_key, leaf.shape, -127, 128, leaf.dtype))
        elif name == "scale" and path[-2].key in ("kernel", "head"):  # of int8, uniform in ±127
            made.append(jnp.full(leaf.shape, 0.02 * 3**0.5 / 127, leaf.dtype))
        elif name in ("scale", "bias"):
            made.append(jnp.full(leaf.shape, float(name == "scale"), leaf.dtype))
        else:
            made.append(0.02 * jax.random.normal(leaf_key, leaf.shape, leaf.dtype))
    return jax.tree.unflatten(tree, made)
