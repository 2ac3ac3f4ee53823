"""Tokenizers of Hugging Face folders and GGUF files, as the JSON text of `tokenizers.Tokenizer`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autopar.core.errors import BadInput
from autopar.io.configs import read_json

DIGITS = frozenset({"smollm"})
"""GGUF's names of splits that cut GPT-2's pieces further, a piece per digit."""
PLAIN = frozenset({"gpt-2", "gpt2", "default"})
"""GGUF's names of GPT-2's own split."""


def read_tokenizer(folder: Path) -> str | None:
    """Returns the tokenizer of a folder as JSON, None when it has none.

    Read are `tokenizer.json`, or a byte-pair vocabulary in `vocab.json` and `merges.txt` (as OPT's).

    Raises:
        BadInput: there is a tokenizer, but of a kind that is not read here.
    """
    if (folder / "tokenizer.json").is_file():
        return (folder / "tokenizer.json").read_text(encoding="utf-8")
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_vocabulary(folder)
    if (folder / "tokenizer.model").is_file():
        raise BadInput(
            f"{folder} has a tokenizer.model only, which is not read here; make a tokenizer.json of it with "
            "transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return None


def byte_pairs(
    vocabulary: Mapping[str, int],
    merges: Iterable[tuple[str, str]],
    special: Sequence[str],
    *,
    digits: bool = False,
    first: str | None = None,
) -> str:
    """Returns the JSON of a byte-level byte-pair tokenizer (GPT-2's, Radford et al. 2019).

    Args:
        vocabulary: ids by token, tokens in GPT-2's printable bytes.
        merges: pairs, the most frequent first.
        special: tokens of the vocabulary that stand for no text.
        digits: make a piece of each digit before pairs are merged.
        first: token put before every text.
    """
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    except ImportError:
        raise BadInput('text needs tokenizers; install it: pip install "autopar[serve]"') from None

    made = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges)))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single = pre_tokenizers.Digits(individual_digits=True)
    split = pre_tokenizers.Sequence([single, by_bytes]) if digits else by_bytes
    made.pre_tokenizer = split  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if first is not None:
        pattern, pair = f"{first} $A", f"{first} $A {first} $B"
        made.post_processor = processors.TemplateProcessing(pattern, pair, [(first, vocabulary[first])])  # type: ignore[assignment]
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return made.to_str()


def _from_vocabulary(folder: Path) -> str:
    vocabulary = read_json(folder / "vocab.json")
    settings = read_json(folder / "tokenizer_config.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise BadInput(
            f"expected two tokens a line in {folder / 'merges.txt'}, but got {' '.join(wrong[0])!r}"
        )
    names = {
        key: token_text(value)
        for key, value in (settings | read_json(folder / "special_tokens_map.json")).items()
        if key.endswith("_token")
    }
    special = sorted({t for t in names.values() if t in vocabulary}, key=lambda t: vocabulary[t])
    start = names.get("bos_token") if settings.get("add_bos_token") else None
    return byte_pairs(vocabulary, pairs, special, first=start)  # type: ignore[arg-type]


def token_text(value: Any) -> str | None:
    """Returns a special token's text: files give it plain or with its properties."""
    return value.get("content") if isinstance(value, dict) else value


def chat_template(folder: Path) -> str | None:
    """Returns the chat template of a folder (Jinja), None for a base model without one."""
    own = folder / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    found = read_json(folder / "chat_template.json").get("chat_template")
    found = found or read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        return next((t["template"] for t in found if t.get("name") == "default"), None)
    return found
