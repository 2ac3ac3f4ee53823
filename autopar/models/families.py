"""Kinds of models: what it takes to make a step out of a config of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from autopar.models import gpt, mlp, moe, opt, wide_resnet

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
    make_batch: Callable[..., dict[str, Array]]
    inputs: str
    training: bool = True


def _token_batch(config: Any, key: Array, *, batch: int, sequence: int) -> dict[str, Array]:
    tokens = jax.random.randint(key, (batch, sequence + 1), 0, config.vocabulary, jnp.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}


def _image_batch(
    config: wide_resnet.WideResNetConfig, key: Array, *, batch: int, sequence: None
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
OPT = Family("OPT", opt.init, opt.loss, opt.forward, _token_batch, "tokens", training=False)
MLP = Family("perceptron", mlp.init, mlp.loss, mlp.forward, _vector_batch, "inputs")
