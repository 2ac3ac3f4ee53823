"""The next token of a row from its logits: penalties, bias, temperature, top-k, top-p, min-p, and a seed.

Rows are worked on one by one, each vectorised over the vocabulary: a row stays in the second-level cache
(more than twice as fast as all rows at once), and its result cannot depend on the rows beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from autopar.serve.request import Sampling, TokenLogprob

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_WIDTHS = (256, 4096)
"""So many of the likeliest tokens are sorted first, more only if top-p reaches beyond them."""
_CHUNK = 256
"""Probabilities are summed in chunks: finding the one that is drawn needs no running sum over all."""


def mix(value: int) -> int:
    """Returns 64 well-mixed bits of `value`, the output function of SplitMix64.

    Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def random_key(seed: int, index: int) -> int:
    """Returns the key of the random numbers of a request's answer number `index`."""
    return mix(mix(seed) + _GAMMA * (index + 1))


def uniform(key: int, position: int) -> float:
    """Returns the random number in [0, 1) of a position; none before it needs to be drawn (SplitMix64)."""
    return (mix(key + _GAMMA * (position + 1)) >> 11) * 2.0**-53


class TokenCounts:
    """The tokens of a sequence, each once, with how often it is in the answer: what penalties need."""

    def __init__(self, prompt: Iterable[int]):
        tokens = list(dict.fromkeys(prompt))
        self._slots = {token: slot for slot, token in enumerate(tokens)}
        self._tokens = np.array(tokens, np.int64)
        self._counts = np.zeros(len(tokens), np.float32)

    def add(self, token: int) -> None:
        """Counts one more token of the answer."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot >= len(self._tokens):
            more = max(16, slot)
            self._tokens = np.concatenate([self._tokens, np.zeros(more, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(more, np.float32)])
        self._tokens[slot] = token
        self._counts[slot] += 1

    def penalise(self, logits: np.ndarray, sampling: Sampling) -> None:
        """Applies the penalties to a row's logits `[vocabulary]`, in place."""
        size = len(self._slots)
        tokens, counts = self._tokens[:size], self._counts[:size]
        values = logits[tokens]
        if sampling.repetition_penalty != 1:
            by = np.float32(sampling.repetition_penalty)
            values = np.where(values > 0, values / by, values * by)
        if sampling.frequency_penalty:
            values = values - counts * np.float32(sampling.frequency_penalty)
        if sampling.presence_penalty:
            values = values - (counts > 0) * np.float32(sampling.presence_penalty)
        logits[tokens] = values


class Sampler:
    """Chooses the tokens of one answer.

    Attributes:
        sampling: how. plain: whether the likeliest token of the raw logits is all that is needed.
    """

    def __init__(self, sampling: Sampling, seed: int, index: int, prompt: Iterable[int] = ()):
        """Args: prompt: the tokens before the answer, for the repetition penalty."""
        self.sampling = sampling
        self.plain = sampling.plain
        self._key = random_key(seed, index)
        self._counts = TokenCounts(prompt) if sampling.penalised else None
        self._biased = np.fromiter(sampling.logit_bias, np.int64, len(sampling.logit_bias))
        self._bias = np.array([sampling.logit_bias[int(token)] for token in self._biased], np.float32)

    def add(self, token: int) -> None:
        """Tells which token was chosen (it counts for the penalties from now on)."""
        if self._counts is not None:
            self._counts.add(token)

    def adjust(self, logits: np.ndarray) -> np.ndarray:
        """Returns a row's logits with bias and penalties, the row itself if there are none."""
        if self._counts is None and not len(self._biased):
            return logits
        logits = logits.copy()
        logits[self._biased] += self._bias
        if self._counts is not None:
            self._counts.penalise(logits, self.sampling)
        return logits

    def choose(self, logits: np.ndarray, position: int) -> int:
        """Returns the next token.

        Args:
            logits: float32 `[vocabulary]`. position: index in the sequence of the token to be chosen.

        Returns:
            The token's id; -1 if the logits are not numbers.
        """
        logits = self.adjust(logits)
        best = int(logits.argmax())
        if not logits[best] > -math.inf:  # NaN is its own argmax; all -inf leaves nothing
            return -1
        sampling = self.sampling
        if sampling.temperature == 0 or sampling.top_k == 1 or logits[best] == math.inf:
            return best
        point = uniform(self._key, position)
        if sampling.top_k or sampling.top_p < 1:
            return _draw_ranked(logits, sampling, point)
        return _draw(_weights(logits, best, sampling.temperature), sampling.min_p, point)


def _weights(logits: np.ndarray, best: int, temperature: float) -> np.ndarray:
    """Probabilities relative to the likeliest token's, in one new array."""
    weights = np.subtract(logits, logits[best])
    if temperature != 1:
        weights *= np.float32(1 / max(temperature, 1e-6))
    return np.exp(weights, out=weights)


def _draw(weights: np.ndarray, min_p: float, point: float) -> int:
    """The token at `point` of the cumulated weights; the largest weight is 1."""
    if min_p:
        weights[weights < np.float32(min_p)] = 0
    starts = np.arange(0, len(weights), _CHUNK)
    sums = np.cumsum(np.add.reduceat(weights, starts), dtype=np.float64)
    target = point * sums[-1]
    chunk = int(np.searchsorted(sums, target, side="right"))
    before = sums[chunk - 1] if chunk else 0.0
    part = weights[starts[chunk] : starts[chunk] + _CHUNK]
    return int(starts[chunk]) + _pick(part, target - before)


def _pick(weights: np.ndarray, target: float) -> int:
    """The first index at which the cumulated weights exceed `target`; if rounding leaves none, the last."""
    at = int(np.searchsorted(np.cumsum(weights, dtype=np.float64), target, side="right"))
    return at if at < len(weights) else int(np.flatnonzero(weights)[-1])


def _draw_ranked(logits: np.ndarray, sampling: Sampling, point: float) -> int:
    """Draws among the likeliest tokens: top-k, of these top-p, of these min-p (in Hugging Face's order)."""
    ranked, weights, whole = _rank(logits, sampling.temperature, sampling.top_k, sampling.top_p)
    cumulated = np.cumsum(weights, dtype=np.float64)
    keep = int(np.searchsorted(cumulated, sampling.top_p * whole, side="left")) + 1
    if sampling.min_p:
        keep = min(keep, int((weights >= np.float32(sampling.min_p)).sum()))
    keep = min(keep, len(ranked))
    return int(ranked[_pick(weights[:keep], point * cumulated[keep - 1])])


def _rank(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float
) -> tuple[np.ndarray, np.ndarray, float]:
    """(likeliest tokens, best first, enough for both limits; their weights; the weight of all of top-k)."""
    size = len(logits)
    if not 0 < top_k < size:  # top-p alone: few tokens are mostly enough
        every = _weights(logits, int(logits.argmax()), temperature)
        whole = float(every.sum(dtype=np.float64))
        for width in _WIDTHS:
            ranked = largest(logits, min(width, size))
            weights = every[ranked]
            if weights.sum(dtype=np.float64) >= top_p * whole:
                return ranked, weights, whole
    ranked = largest(logits, min(top_k or size, size))
    weights = _weights(logits[ranked], 0, temperature)
    return ranked, weights, float(weights.sum(dtype=np.float64))


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Returns the indices of the `count` largest values, best first, the lowest index first among equals."""
    size = len(values)
    if count < size:
        least = values[np.argpartition(values, size - count)[size - count]]
        chosen = np.flatnonzero(values >= least)  # all that equal the last one, of which the first count
    else:
        chosen = np.arange(size)
    return chosen[np.argsort(-values[chosen], kind="stable")[:count]]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the log probabilities of `[..., vocabulary]` logits, float32."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, dtype=np.float64, keepdims=True)).astype(np.float32)


def logprob(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """Returns a token's log probability and those of the `top` likeliest, from a row's raw logits."""
    most = float(logits.max())
    total = most + math.log(np.exp(logits - np.float32(most)).sum(dtype=np.float64))
    best = largest(logits, min(top, len(logits))).tolist() if top else ()
    alternatives = tuple((each, float(logits[each]) - total) for each in best)
    return TokenLogprob(token, float(logits[token]) - total, alternatives)
