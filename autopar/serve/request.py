"""What a client asks for and what it gets: Request and Sampling in, Output pieces back."""

from __future__ import annotations

import enum
import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from autopar.core.errors import AutoparError, BadInput

_numbers = itertools.count(1)
MOST_LOGPROBS = 100
"""Alternatives per token that may be asked for."""


class BadParameter(BadInput):
    """A field of a request that is out of range.

    Attributes:
        parameter: name of the field, as in `Sampling` or `Request`.
    """

    def __init__(self, parameter: str, message: str):
        super().__init__(f"{parameter} {message}")
        self.parameter = parameter


class QueueFull(AutoparError):
    """A request that found the queue full; HTTP answers 429.

    Attributes:
        retry_after: seconds after which trying again is worthwhile, at least 1.
    """

    def __init__(self, message: str, retry_after: float):
        super().__init__(f"{message}; try again in {retry_after:.0f} s")
        self.retry_after = retry_after


class Unavailable(AutoparError):
    """A request that came while the engine drains, is closed or has failed; HTTP answers 503."""


class FinishReason(enum.StrEnum):
    """Why an answer ended. STOP: end-of-text token, stop token or stop string; LENGTH: max_tokens or the
    model's longest sequence; CANCELLED: by the client; ERROR: the model failed (`Output.error` says how)."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults sample from the model's distribution as it is.

    Attributes:
        max_tokens: new tokens at most, 0 allowed (the prompt is only scored); None: as many as the longest
            sequence leaves.
        temperature: 0 is greedy.
        top_k: keep the k likeliest tokens, 0 for all. top_p: keep the likeliest tokens that together reach
            this probability. min_p: drop tokens less likely than this times the likeliest.
        repetition_penalty: divides (multiplies, if negative) the logits of tokens seen in prompt or answer
            (Keskar et al. 2019, as in Hugging Face's generate); 1 is none.
        presence_penalty, frequency_penalty: subtracted from the logits of tokens in the answer, once and per
            occurrence (as OpenAI defines them).
        logit_bias: token id -> what is added to its logit.
        seed: the same request with the same seed gives the same tokens; None draws one.
        n: answers wanted. best_of: answers made, the n with the best mean log probability returned (None: n).
        num_beams: beam search over so many beams if > 1 (n of them returned); needs temperature 0 or the
            default, which it ignores. length_penalty: beams are ranked by log probability / length ** this.
            early_stopping: stop as soon as num_beams answers are complete.
        stop: strings that end an answer and are left out of it. stop_token_ids: tokens that do.
        ignore_eos: go on after the end-of-text token.
        logprobs: alternatives to report with each token (0: only the token's own), None for none.
        prompt_logprobs: the same for the tokens of the prompt.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    @property
    def width(self) -> int:
        """Returns how many answers are made."""
        return self.num_beams if self.num_beams > 1 else (self.best_of or self.n)

    @property
    def streams(self) -> bool:
        """Returns whether tokens go out as they are made: not if answers are picked at the end."""
        return self.num_beams == 1 and self.width == self.n

    @property
    def penalised(self) -> bool:
        """Returns whether the logits depend on the tokens so far."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def plain(self) -> bool:
        """Returns whether the likeliest token of the raw logits is all that is needed."""
        return (
            self.temperature == 0
            and self.logprobs is None
            and not self.penalised
            and not self.logit_bias
            and self.width == self.n
            and self.num_beams == 1
        )

    def check(self, vocabulary: int, most: int = 128) -> None:
        """Raises BadParameter, naming the field and its range, unless all can be used.

        Args:
            vocabulary: number of tokens of the model. most: answers that one request may make.
        """
        for name, low, high, open_low in _RANGES:
            value = getattr(self, name)
            if value is None:
                continue
            whole = name in _WHOLE
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise BadParameter(name, f"must be {'an integer' if whole else 'a number'}, but is {value!r}")
            if not math.isfinite(value) or value > high or value < low or (open_low and value == low):
                raise BadParameter(name, f"must be {_range_text(low, high, open_low)}, but is {value}")
        self._check_width(most)
        self._check_stops(vocabulary)
        for token, bias in self.logit_bias.items():
            if not 0 <= token < vocabulary:
                raise BadParameter("logit_bias", f"names token {token}, but ids end at {vocabulary - 1}")
            if not -1000 <= bias <= 1000:
                raise BadParameter("logit_bias", f"must lie in -1000 … 1000, but token {token} has {bias}")

    def _check_width(self, most: int) -> None:
        if self.width > most:
            name = "num_beams" if self.num_beams > 1 else "n" if self.best_of is None else "best_of"
            raise BadParameter(name, f"must be at most {most} on this server, but is {self.width}")
        if self.best_of is not None and self.best_of < self.n:
            raise BadParameter("best_of", f"must be at least n = {self.n}, but is {self.best_of}")
        if self.num_beams == 1:
            return
        if self.n > self.num_beams:
            raise BadParameter("n", f"must be at most num_beams = {self.num_beams}, but is {self.n}")
        for name, default in _NOT_WITH_BEAMS:
            if getattr(self, name) != default:
                raise BadParameter(name, "cannot be combined with num_beams > 1; leave it out")
        if self.temperature not in (0.0, 1.0):
            raise BadParameter("temperature", "must be 0 or 1 with num_beams > 1, which does not sample")

    def _check_stops(self, vocabulary: int) -> None:
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise BadParameter("stop", f"must be strings that are not empty, but is {list(self.stop)!r}")
        for token in self.stop_token_ids:
            if not 0 <= token < vocabulary:
                raise BadParameter("stop_token_ids", f"must lie in 0 … {vocabulary - 1}, but has {token}")


_INF = float("inf")
_RANGES = (  # name, low, high, whether low itself is refused
    ("max_tokens", 0, _INF, False),
    ("temperature", 0, 100, False),
    ("top_k", 0, _INF, False),
    ("top_p", 0, 1, True),
    ("min_p", 0, 1, False),
    ("repetition_penalty", 0, 100, True),
    ("presence_penalty", -2, 2, False),
    ("frequency_penalty", -2, 2, False),
    ("seed", -(2**63), 2**64 - 1, False),
    ("n", 1, _INF, False),
    ("best_of", 1, _INF, False),
    ("num_beams", 1, _INF, False),
    ("length_penalty", -100, 100, False),
    ("logprobs", 0, MOST_LOGPROBS, False),
    ("prompt_logprobs", 0, MOST_LOGPROBS, False),
)
_NOT_WITH_BEAMS = (
    ("best_of", None),
    ("top_k", 0),
    ("top_p", 1.0),
    ("min_p", 0.0),
    ("logprobs", None),
    ("stop", ()),
    ("presence_penalty", 0.0),
    ("frequency_penalty", 0.0),
)
_WHOLE = {"max_tokens", "top_k", "seed", "n", "best_of", "num_beams", "logprobs", "prompt_logprobs"}


def _range_text(low: float, high: float, open_low: bool) -> str:
    least = f"more than {low}" if open_low else f"at least {low}"
    return least if high == _INF else f"{least} and at most {high}"


@dataclass(frozen=True)
class Request:
    """A prompt and what is wanted of it.

    Attributes:
        prompt: token ids, at least one.
        sampling: how the answer is chosen.
        key: whose request it is; keys share the engine fairly by their weights.
        salt: prefixes are shared only between requests with the same salt.
        id: name of the request, for `Engine.cancel`.
        arrival: seconds on `time.monotonic()`'s clock.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()
    key: str = ""
    salt: str = ""
    id: str = field(default_factory=lambda: f"request-{next(_numbers)}")
    arrival: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token's log probability under the model's raw logits, and the likeliest tokens at its place.

    Attributes:
        token: its id. logprob: natural logarithm of its probability.
        top: (token id, log probability), best first, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """A piece of an answer; the pieces of one index, joined, are the answer.

    Attributes:
        index: which of the n answers.
        token_ids: new tokens, the one that ended the answer among them.
        text: new text; whole characters, none of a stop string, nothing of end and stop tokens. It may lag
            behind `token_ids` while a character is half done or a stop string may have begun.
        logprobs: one for each of `token_ids` if asked for.
        prompt_logprobs: one for each token of the prompt (None for the first), in a request's first piece.
        finish: set in an index's last piece, and only there.
        stop: the stop string or stop token that ended it, if one did.
        error: what went wrong when finish is ERROR.
        prompt_tokens, cached_tokens: tokens of the prompt, and how many of them the prefix cache held.
        completion_tokens: tokens of this answer so far.
        cumulative_logprob: sum over the answer of its tokens' log probabilities where they are known
            (logprobs, best_of or num_beams), else None.
    """

    index: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: FinishReason | None = None
    stop: str | int | None = None
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cumulative_logprob: float | None = None
