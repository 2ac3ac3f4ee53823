"""Beam search over one prompt, step by step; the same answers as Hugging Face's `generate(num_beams=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from autopar.serve.sampling import largest

_NEVER = np.float32(-1e9)


@dataclass(frozen=True)
class Hypothesis:
    """A complete answer: its tokens, its score (log probability / length ** length_penalty), why it ended."""

    tokens: tuple[int, ...]
    score: float
    logprob: float
    ended: bool  # by an end token, not by its length


@dataclass
class BeamSearch:
    """The state of a search.

    Each step extends all beams by all tokens and looks at the best of these: so many that even if all beams
    could end, enough go on. Those that ended compete with the complete answers found before, scored by
    log probability / length ** penalty; the best of the others are the next beams. The search is over when
    the best beam's score, as if it ended now, is no better than the worst complete answer's, when
    `early_stopping` is set and there are enough answers, or at the longest length.

    Attributes:
        beams: how many. ends: tokens that end an answer. limit: new tokens at most.
        tokens: per beam its new tokens. scores: per beam its log probability, float32.
        found: complete answers, best first, at most `beams`.
    """

    beams: int
    ends: frozenset[int]
    limit: int
    length_penalty: float = 1.0
    early_stopping: bool = False
    tokens: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    scores: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float32))
    found: list[Hypothesis] = field(default_factory=list)
    hopeless: bool = False

    def advance(self, logprobs: np.ndarray) -> Sequence[tuple[int, int]]:
        """Extends the beams by one token.

        Args:
            logprobs: float32 `[beams so far, vocabulary]`, of the next token of each beam (one row at first).

        Returns:
            (parent, token) of each beam that goes on; empty when the search is over.
        """
        total = logprobs.astype(np.float32) + self.scores[:, None]
        candidates = largest(total.ravel(), max(2, 1 + len(self.ends)) * self.beams)
        vocabulary = logprobs.shape[1]
        length = len(self.tokens[0]) + 1
        going: list[tuple[int, int, np.float32]] = []
        ended: list[Hypothesis] = []
        for rank, at in enumerate(candidates):
            parent, token = divmod(int(at), vocabulary)
            score = total[parent, token]
            if token not in self.ends and length < self.limit:
                going.append((parent, token, score))
            elif rank < self.beams:  # lower ones are only there so that enough beams go on
                normal = score / np.float32(length**self.length_penalty)
                ends = token in self.ends
                ended.append(Hypothesis((*self.tokens[parent], token), float(normal), float(score), ends))
        self._complete(ended)
        going = going[: self.beams]
        self.tokens = [(*self.tokens[parent], token) for parent, token, _ in going]
        self.scores = np.array([score for *_, score in going], np.float32)
        return [] if self._over(length) else [(parent, token) for parent, token, _ in going]

    def _complete(self, ended: list[Hypothesis]) -> None:
        full = len(self.found) == self.beams
        if self.hopeless or (full and self.early_stopping):
            return
        self.found = sorted([*self.found, *ended], key=lambda answer: -answer.score)[: self.beams]

    def _over(self, length: int) -> bool:
        if not len(self.scores):
            return True
        full = len(self.found) == self.beams
        worst = np.float32(self.found[-1].score) if full else _NEVER
        best = self.scores[0] / np.float32(length**self.length_penalty)
        self.hopeless = self.hopeless or not best > worst
        return self.hopeless or (full and self.early_stopping)
