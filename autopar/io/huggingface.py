"""A Hugging Face folder as a model to serve: config, weights read by slices, tokenizer, chat template."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from autopar.core.errors import BadInput
from autopar.io.configs import read_config, read_json
from autopar.io.names import NAMES
from autopar.io.safetensors import open_safetensors
from autopar.io.tokenizer import chat_template, read_tokenizer, token_text
from autopar.io.weights import RandomWeights, WeightSource, by_path
from autopar.models.serving import FAMILIES, get_serving

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class Checkpoint:
    """A model to be served; nothing of its weights is read yet, and it can be pickled.

    Attributes:
        name: for people and for the API.
        family: name of its module in `autopar.models`. config: that module's `Config`.
        weights: its parameters.
        tokenizer: JSON of a `tokenizers.Tokenizer`; None: it reads and writes ids only.
        chat_template: Jinja; None for a base model.
        special: text of special tokens by name (`bos_token`, `eos_token`, …), as a template reads them.
        bos: id put before a text; None when unknown.
        eos: ids that end an answer.
        generation: defaults of `generation_config.json` (temperature, top_p, …).
    """

    name: str
    family: str
    config: Any
    weights: WeightSource
    tokenizer: str | None = None
    chat_template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)
    bos: int | None = None
    eos: tuple[int, ...] = ()
    generation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def module(self) -> ModuleType:
        """The family's module: `Config`, `DECODER`, `parameter_shapes`, …."""
        return FAMILIES[self.family]

    def load_tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer, None when there is none."""
        if self.tokenizer is None:
            return None
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise BadInput('text needs tokenizers; install it: pip install "autopar[serve]"') from None
        return Tokenizer.from_str(self.tokenizer)


def open_directory(
    path: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    random: bool = False,
    seed: int = 0,
) -> Checkpoint:
    """Returns the model in a Hugging Face folder; of the weights only headers are read.

    Args:
        path: a folder with `config.json`, `*.safetensors`, and perhaps tokenizer files, a chat template and
            `generation_config.json`.
        dtype: of activations and products. param_dtype: of parameters; None for `dtype`.
        random: draw weights from `seed` instead; the folder then needs no `*.safetensors`.
    Raises:
        BadInput, UnknownName: what is missing, unreadable or not supported, by name.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BadInput(f"expected a folder with config.json and *.safetensors, but {folder} is not there")
    family, config = serving = read_config(folder / "config.json", dtype=dtype, param_dtype=param_dtype)
    shapes = by_path(serving.module.parameter_shapes(config))
    source = RandomWeights(shapes, seed) if random else open_safetensors(folder, NAMES[family], shapes)
    settings = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json")
    checkpoint = Checkpoint(
        name=folder.resolve().name,
        family=family,
        config=config,
        weights=source,
        tokenizer=read_tokenizer(folder),
        chat_template=chat_template(folder),
        special=_special(folder),
        generation=generation,
    )
    return _with_ends(checkpoint, settings | generation)


def open_random(name: str, *, seed: int = 0, dtype: Any = jnp.float32, param_dtype: Any = None) -> Checkpoint:
    """Returns a published model by name with random weights and no tokenizer.

    Args:
        name: one of `autopar.models.serving_names()`.
        seed: of the weights. dtype, param_dtype: as in `open_directory`.
    """
    serving = get_serving(name, dtype=dtype, param_dtype=param_dtype)
    shapes = by_path(serving.module.parameter_shapes(serving.config))
    return Checkpoint(name, serving.family, serving.config, RandomWeights(shapes, seed))


def _special(folder: Path) -> dict[str, str]:
    found = read_json(folder / "tokenizer_config.json") | read_json(folder / "special_tokens_map.json")
    texts = {name: token_text(found.get(name)) for name in SPECIAL}
    return {name: text for name, text in texts.items() if text}


def _with_ends(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Checkpoint:
    """Returns the checkpoint with the ids of its first and last tokens.

    An answer ends at what the configs say and at the tokenizer's own end, which chat models may say alone.
    """
    ends = settings.get("eos_token_id")
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    bos = settings.get("bos_token_id")
    tokenizer = checkpoint.load_tokenizer() if "eos_token" in checkpoint.special else None
    if tokenizer is not None:
        own = tokenizer.token_to_id(checkpoint.special["eos_token"])
        ends += [] if own is None or own in ends else [own]
    return dataclasses.replace(checkpoint, bos=bos, eos=tuple(ends))
