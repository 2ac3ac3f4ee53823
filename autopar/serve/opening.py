"""Which model is meant: a directory, a file, a known name, or the small one that can be installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autopar.cluster import Cluster
from autopar.core.errors import BadInput, UnknownName
from autopar.serve.plan import half_for

if TYPE_CHECKING:
    from autopar.io.huggingface import Checkpoint

NATIVE = {"llama": "bfloat16", "bloom": "bfloat16"}
"""The 16-bit type of a family's published weights; float16 for others."""


def opened(
    model: str | Path | Checkpoint | None, dtype: str, weights: str | None = None, seed: int = 0
) -> Checkpoint:
    """Returns a model with its weights not read yet.

    Args:
        model: as in `autopar.serve.load`. dtype: of weights and activations.
        weights: None: those of the model; "random": drawn from `seed`.

    Raises:
        BadInput, UnknownName: no such model, an incomplete directory.
    """
    from autopar.io import gguf, huggingface
    from autopar.serve.stand_in import stand_in

    if weights not in (None, "random"):
        raise BadInput(f'weights is None (read them) or "random", got {weights!r}')
    if isinstance(model, huggingface.Checkpoint):
        return model
    if model is None:
        return gguf.open_demo(dtype=dtype)
    path, random = Path(model), weights == "random"
    if not path.exists() and not random:
        _refuse(str(model))
    if path.is_dir():
        return huggingface.open_directory(path, dtype=dtype, random=random, seed=seed)
    if path.suffix == ".gguf":
        return gguf.open_gguf(path, dtype=dtype)
    made = huggingface.open_random(str(model), seed=seed, dtype=dtype)
    return replace(made, tokenizer=stand_in(made.config.vocabulary).to_str())


def suited(
    model: Any, dtype: str | None, weights: str | None, seed: int, cluster: Cluster, host: bool
) -> Checkpoint:
    """Returns a model in `dtype`; None: in float32 on host devices, else in the 16 bits its devices have."""
    if dtype is None:
        dtype = "float32"
        if not host:
            dtype = half_for(cluster, NATIVE.get(opened(model, dtype, weights, seed).family, "float16"))
    return opened(model, dtype, weights, seed)


def quantised(checkpoint: Checkpoint, kind: str | None) -> Checkpoint:
    """Returns a model with its kernels as `kind` says: None: as they are, or "int8"."""
    if kind is None:
        return checkpoint
    if kind != "int8":
        raise BadInput(f'quantise is None or "int8", got {kind!r}')
    from autopar.io.int8 import quantised

    return quantised(checkpoint)


def _refuse(model: str) -> None:
    from autopar.models.serving import serving_names

    if model in serving_names():
        raise BadInput(
            f"{model} is known by its shapes only; pass the directory of its weights, or weights='random' "
            "(on the command line --weights random)"
        )
    raise UnknownName("model or directory", model, serving_names())
