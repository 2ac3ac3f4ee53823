"""`autopar bench int8`: what weights in int8 cost a model, on a text."""

from __future__ import annotations

import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import jax
import jax.numpy as jnp
import numpy as np

from autopar.core.errors import BadInput
from autopar.io.huggingface import Checkpoint
from autopar.io.int8 import quantised
from autopar.io.weights import by_path, read_all
from autopar.report.units import size
from autopar.serve.opening import opened

LEAST = 2
"""Tokens of a text that say anything: one is read, the next judged."""


@dataclass(frozen=True)
class Judged:
    """How a model reads a text.

    Attributes:
        nbytes: of its parameters. loss: mean nats per token. likeliest: the likeliest token at each place.
    """

    nbytes: int
    loss: float
    likeliest: np.ndarray


def judge(checkpoint: Checkpoint, ids: np.ndarray) -> Judged:
    """Returns how a model reads token ids `[time]`; all its parameters are read into this process."""
    module, config = checkpoint.module, checkpoint.config
    shapes = module.parameter_shapes(config)
    params = read_all(checkpoint.weights, shapes)

    @jax.jit
    def read(params: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = module.forward(config, params, ids[None])[0].astype(jnp.float32)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), ids[1:, None], axis=1)
        return -chosen.mean(), logits.argmax(-1)

    loss, likeliest = read(params, jnp.asarray(ids, jnp.int32))
    nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in by_path(shapes).values())
    return Judged(nbytes, float(loss), np.asarray(likeliest))


def compare(checkpoint: Checkpoint, ids: np.ndarray) -> tuple[Judged, Judged, float]:
    """Returns a model as it is, in int8, and the share of places where their likeliest tokens agree."""
    plain, small = judge(checkpoint, ids), judge(quantised(checkpoint), ids)
    return plain, small, float((plain.likeliest == small.likeliest).mean())


@click.command()
@click.argument("model", required=False)
@click.option("--text", type=click.Path(exists=True, dir_okay=False), help="a file to read; the default is a "
              "piece of Python's standard library")  # fmt: skip
@click.option(
    "--tokens", default=512, show_default=True, type=click.IntRange(min=LEAST), help="of it to read"
)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32",
              show_default=True, help="that int8 is compared with, and that activations have")  # fmt: skip
@click.option("--weights", type=click.Choice(["random"]), help="random weights, for any known model")
def int8(model: str | None, text: str | None, tokens: int, dtype: str, weights: str | None) -> None:
    """Reads a text with MODEL as it is and with its weights in int8, and prints what is lost.

    MODEL as in `autopar serve`. Perplexity is exp(loss); a loss grows where int8 rounds away what matters.
    """
    checkpoint = opened(model, dtype, weights)
    ids = _ids(checkpoint, text, tokens)
    plain, small, agree = compare(checkpoint, ids)
    click.echo(f"{checkpoint.name}, {len(ids)} tokens, activations in {dtype}")
    for name, found in ((f"weights in {dtype}", plain), ("weights in int8", small)):
        worth = f"loss {found.loss:.4f} nats a token, perplexity {np.exp(found.loss):.3f}"
        click.echo(f"  {name}: {size(found.nbytes)}, {worth}")
    click.echo(
        f"  int8: loss {100 * (small.loss / plain.loss - 1):+.2f} %, "
        f"the likeliest token is the same at {100 * agree:.1f} % of the places"
    )


def _ids(checkpoint: Checkpoint, text: str | None, tokens: int) -> np.ndarray:
    """The first tokens of a text; random ones for a model without a tokenizer."""
    tokenizer = checkpoint.load_tokenizer()
    tokens = min(tokens, checkpoint.config.positions)
    if tokenizer is None:
        return np.random.default_rng(0).integers(0, checkpoint.config.vocabulary, tokens)
    path = Path(text) if text else Path(sysconfig.get_path("stdlib")) / "argparse.py"
    found = tokenizer.encode(path.read_text(encoding="utf-8", errors="replace")[: 32 * tokens]).ids[:tokens]
    if len(found) < LEAST:
        raise BadInput(f"{path} has {len(found)} tokens, too few to say anything")
    return np.array(found)
