"""Kinds of models: what it takes to make a step out of a config of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from autopar.models import bert, gpt, llama, mlp, moe, opt, unet, vit, wide_resnet

Array = jax.Array


@dataclass(frozen=True)
class Family:
    """The verbs of one kind of model; each takes the model's config first.

    Attributes:
        title: for people.
        init, loss, forward: as in the model's file; `forward(config, params, inputs)` returns logits.
        make_batch: `(config, key, *, batch, sequence) → dict`, random data.
        inputs: the entry of a batch that `forward` reads.
        training: whether `get` gives a train step unless told otherwise.
    """

    title: str
    init: Callable[..., Any]
    loss: Callable[..., Array]
    forward: Callable[..., Array]
    make_batch: Callable[..., dict[str, Any]]
    inputs: str
    training: bool = True


def _token_batch(config: Any, key: Array, *, batch: int, sequence: int) -> dict[str, Array]:
    tokens = jax.random.randint(key, (batch, sequence + 1), 0, config.vocabulary, jnp.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def _masked_batch(config: bert.BERTConfig, key: Array, *, batch: int, sequence: int) -> dict[str, Array]:
    """Pairs of segments, some tokens of both hidden."""
    some, places, ends = jax.random.split(key, 3)
    tokens = jax.random.randint(some, (batch, sequence), 0, config.vocabulary, jnp.int32)
    tokens, where, targets = bert.hide(config, tokens, places)
    second = jnp.arange(sequence) >= jax.random.randint(ends, (batch, 1), 1, sequence + 1)
    return {"tokens": tokens, "segments": second.astype(jnp.int32), "where": where, "targets": targets}


def _noise_batch(config: unet.UNetConfig, key: Array, *, batch: int, sequence: None) -> dict[str, Any]:
    images, noise, times = jax.random.split(key, 3)
    shape = batch, config.image, config.image, config.colours
    inputs = {
        "images": jax.random.normal(images, shape, jnp.float32),
        "times": jax.random.randint(times, (batch,), 0, config.steps, jnp.int32),
    }
    return {"inputs": inputs, "noise": jax.random.normal(noise, shape, jnp.float32)}


def _image_batch(
    config: wide_resnet.WideResNetConfig | vit.ViTConfig, key: Array, *, batch: int, sequence: None
) -> dict[str, Array]:
    images, labels = jax.random.split(key)
    return {
        "images": jax.random.normal(images, (batch, config.image, config.image, 3), jnp.float32),
        "labels": jax.random.randint(labels, (batch,), 0, config.classes, jnp.int32),
    }


def _vector_batch(config: mlp.MLPConfig, key: Array, *, batch: int, sequence: None) -> dict[str, Array]:
    inputs, targets = jax.random.split(key)
    return {
        "inputs": jax.random.normal(inputs, (batch, config.inputs), jnp.float32),
        "targets": jax.random.normal(targets, (batch, config.outputs), jnp.float32),
    }


GPT = Family("GPT", gpt.init, gpt.loss, gpt.forward, _token_batch, "tokens")
MOE = Family("mixture of experts", moe.init, moe.loss, moe.forward, _token_batch, "tokens")
WIDE_RESNET = Family(
    "Wide-ResNet", wide_resnet.init, wide_resnet.loss, wide_resnet.forward, _image_batch, "images"
)
BERT = Family("BERT", bert.init, bert.loss, bert.forward, _masked_batch, "tokens")
VIT = Family("Vision Transformer", vit.init, vit.loss, vit.forward, _image_batch, "images")
UNET = Family("diffusion U-Net", unet.init, unet.loss, unet.forward, _noise_batch, "inputs")
LLAMA = Family("Llama", llama.init, llama.loss, llama.forward, _token_batch, "tokens")
OPT = Family("OPT", opt.init, opt.loss, opt.forward, _token_batch, "tokens", training=False)
MLP = Family("perceptron", mlp.init, mlp.loss, mlp.forward, _vector_batch, "inputs")
