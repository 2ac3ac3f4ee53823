"""What the decoders that are served have in common: the walk through their layers, products and norms.

A model is a `Decoder`, four functions; its `forward` reads whole sequences with them and `step` goes on with
sequences whose keys and values are in blocks. Served layers are unrolled, each with its own weights: a scan
would copy weight slices and the cache at every step; `forward` scans where weights are stacked. Weights are
kept as `[out, in]`: a product is `weight · x`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from autopar.core.errors import BadInput
from autopar.models.layers import cross_entropy
from autopar.models.paged import Cache, LayerCache, Slots, Windowed, attention, causal, slots

Array = jax.Array
Params = dict[str, Any]
Mix = Callable[..., tuple[Array, Any]]
"""`mix(query, key, value, slopes=None)`: attention, and a layer's cache with the new keys and values."""


STACKED = "Blocks"
"""What the parameters of all blocks are called where they are stacked, for one scan over them."""


class Decoder(NamedTuple):
    """A decoder in four functions; what is done with it follows from them.

    Attributes:
        parameter_shapes: `config → params` as `jax.ShapeDtypeStruct`s.
        embed: `(config, params, tokens, positions) → x`, all `[rows, new]`, x `[rows, new, hidden]`.
        block: `(config, params["Block_i"], x, positions, mix) → (x, cache)`, cache as `mix` gave it.
        head: `(config, params, x) → logits`, `[…, vocabulary]` in the dtype of x.
    """

    parameter_shapes: Callable[[Any], Params]
    embed: Callable[..., Array]
    block: Callable[..., tuple[Array, Any]]
    head: Callable[..., Array]

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
            return self.block(config, layer, x, positions, _causal)[0], None

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

        @jax.jit  # traced once for all layers: a deep model is planned several times sooner
        def block(
            params: Params, x: Array, layer: LayerCache | Windowed, where: Slots
        ) -> tuple[Array, LayerCache | Windowed | None]:
            return self.block(config, params, x, where.positions, _Paged(layer, where))

        layers = []
        for i, layer in enumerate(cache):
            with jax.named_scope(f"Block_{i}"):
                x, layer = block(params[f"Block_{i}"], x, layer, where)
            layers.append(layer)
        logits = _head(self, config, params, x if every else last_tokens(x, where)).astype(jnp.float32)
        return logits if every else logits[:, 0], tuple(layers)

    def loss(self, config: Any, params: Params, batch: dict[str, Array], key: Array | None = None) -> Array:
        """Returns the mean next-token cross-entropy (nats); `batch` as in `gpt.loss`, `key` is unused."""
        return cross_entropy(self.forward(config, params, batch["tokens"]), batch["targets"])


class _Paged(NamedTuple):
    """The `Mix` of one layer of a step."""

    cache: LayerCache | Windowed
    where: Slots

    def __call__(self, *args: Any, **more: Any) -> tuple[Array, LayerCache | Windowed]:
        return attention(self.cache, self.where, *args, **more)


def _causal(*args: Any, **more: Any) -> tuple[Array, None]:
    return causal(*args, **more), None


def _embed(decoder: Decoder, *args: Any) -> Array:
    with jax.named_scope("embedding"):
        return decoder.embed(*args)


def _head(decoder: Decoder, *args: Any) -> Array:
    with jax.named_scope("head"):
        return decoder.head(*args)


def last_tokens(x: Array, where: Slots) -> Array:
    """Returns `[rows, 1, hidden]` of `[rows, new, hidden]`: each row's last real token."""
    if x.shape[1] == 1:
        return x
    return jnp.take_along_axis(x, where.last[:, None, None], axis=1, mode="clip")


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
    over = tuple(range(weight.ndim - inputs, weight.ndim)), tuple(range(x.ndim - inputs, x.ndim))
    # The weight is the left operand: on a CPU one token's product then reads it as it lies.
    y = jax.lax.dot_general(weight.astype(x.dtype), x, (over, ((), ())), preferred_element_type=dtype)
    outer = weight.ndim - inputs
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
