"""One answer as the client sees it: text in whole characters up to a stop string, and its pieces."""

from __future__ import annotations

from collections.abc import Sequence

from autopar.serve.detokenize import Detokenizer, StopFinder, Tokenizer
from autopar.serve.request import FinishReason, Output, Sampling, TokenLogprob


class Answer:
    """Collects the tokens of one answer and makes pieces of them.

    Attributes:
        index: which of the request's answers. stops: whether there are stop strings to look for.
        tokens, cumulative: how many tokens there are, and the sum of their log probabilities as far as known.
        last: seconds (monotonic clock) of the last token, None before the first.
        ended: how it ended, and by which stop string or token if by one; None before.
    """

    def __init__(self, index: int, sampling: Sampling, tokenizer: Tokenizer | None, prompt: Sequence[int]):
        self.index = index
        self.stops = bool(sampling.stop) and tokenizer is not None
        self.tokens = 0
        self.cumulative: float | None = None
        self.last: float | None = None
        self.ended: tuple[FinishReason, str | int | None] | None = None
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, prompt)
        self._finder = StopFinder(sampling.stop) if self.stops else None
        self._waiting_ids: list[int] = []
        self._waiting_logprobs: list[TokenLogprob] = []
        self._waiting_text: list[str] = []

    def read(self, tokens: Sequence[int]) -> tuple[str, str | None]:
        """Returns (the text that tokens make certain, the stop string that they complete or None)."""
        if self._detokenizer is None:
            return "", None
        text = self._detokenizer.add(tokens)
        return (text, None) if self._finder is None else self._finder.add(text)

    def rest(self) -> str:
        """Returns the text that was held back; no more tokens come."""
        if self._detokenizer is None:
            return ""
        text = self._detokenizer.finish()
        if self._finder is None:
            return text
        text, stop = self._finder.add(text)
        return text if stop else text + self._finder.finish()

    def add(self, tokens: Sequence[int], text: str, logprobs: Sequence[TokenLogprob] | None) -> None:
        """Adds tokens and text that go out with the next piece."""
        self.tokens += len(tokens)
        self._waiting_ids.extend(tokens)
        if text:
            self._waiting_text.append(text)
        if logprobs is not None:
            self._waiting_logprobs.extend(logprobs)
            self.cumulative = sum((each.logprob for each in logprobs), self.cumulative or 0.0)

    def piece(
        self,
        report: bool,
        prompt_tokens: int,
        cached_tokens: int,
        error: str | None = None,
        prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None,
    ) -> Output:
        """Returns what was added since the last piece; `report`: log probabilities were asked for."""
        finish, stop = self.ended or (None, None)
        output = Output(
            self.index,
            tuple(self._waiting_ids),
            "".join(self._waiting_text),
            tuple(self._waiting_logprobs) if report else None,
            prompt_logprobs,
            finish,
            stop,
            error,
            prompt_tokens,
            cached_tokens,
            self.tokens,
            self.cumulative,
        )
        self._waiting_ids.clear()
        self._waiting_text.clear()
        self._waiting_logprobs.clear()
        return output
