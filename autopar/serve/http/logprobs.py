"""Log probabilities in the two shapes of OpenAI's interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autopar.serve.http.tokens import Words
from autopar.serve.request import TokenLogprob

LEAST = -9999.0
"""Stands for minus infinity, which JSON cannot write."""


def completion_logprobs(
    words: Words, ids: Sequence[int], found: Sequence[TokenLogprob | None], start: int
) -> tuple[dict[str, Any], int]:
    """Returns (the `logprobs` of a completion, where its text ends).

    Args:
        ids: tokens. found: one for each, None where there is none (the first of a prompt).
        start: where in the text they begin, in characters.
    """
    offsets, end = words.offsets(ids, start)
    shape = {
        "tokens": [words.text_of(token) for token in ids],
        "token_logprobs": [None if f is None else max(f.logprob, LEAST) for f in found],
        "top_logprobs": [None if f is None else _top(words, f) for f in found],
        "text_offset": offsets,
    }
    return shape, end


def _top(words: Words, found: TokenLogprob) -> dict[str, float]:
    """Likeliest first, the token itself among them; of tokens with the same text the likeliest counts."""
    pairs: dict[str, float] = {}
    for token, value in (*found.top, (found.token, found.logprob)):
        pairs.setdefault(words.text_of(token), max(value, LEAST))
    return pairs


def chat_logprobs(words: Words, found: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Returns the `logprobs.content` of a chat's answer."""
    return [
        {**_entry(words, f.token, f.logprob), "top_logprobs": [_entry(words, t, v) for t, v in f.top]}
        for f in found
    ]


def _entry(words: Words, token: int, value: float) -> dict[str, Any]:
    raw = words.bytes_of(token)
    return {"token": words.text_of(token), "logprob": max(value, LEAST), "bytes": list(raw)}
