"""What the engine asks of a model: rows of new tokens with the KV blocks that hold what came before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

Ints = np.ndarray
SCRATCH = 0
"""KV block that belongs to no sequence: padding is written there."""


@dataclass(frozen=True)
class StepBatch:
    """One forward pass; every shape is one of the runner's buckets, so that nothing compiles while serving.

    Attributes:
        tokens: int32 `[rows, new]`, zero beyond a row's length.
        positions: int32 `[rows]`, index of each row's first new token in its sequence.
        lengths: int32 `[rows]`, how many of a row's new tokens are real; 0 for a row that is padding.
        tables: int32 `[rows, blocks]`, the KV blocks of a row in order; `SCRATCH` beyond its end.
        sampled: rows whose logits will be looked at; None: perhaps all. Of others the likeliest token is
            enough, and a model in another process need not send more.
        after: a step of the same rows under way whose likeliest tokens are this one's; `tokens` is not read.
    """

    tokens: Ints
    positions: Ints
    lengths: Ints
    tables: Ints
    sampled: tuple[int, ...] | None = None
    after: Logits | None = None


class Logits(Protocol):
    """Results of a step that may still be running; each method waits for what it returns."""

    def greedy(self) -> Ints:
        """Returns the likeliest next token of each row, int32 `[rows]` (the lowest id among equals)."""
        ...

    def last(self) -> np.ndarray:
        """Returns the logits after each row's last real token, float32 `[rows, vocabulary]`.

        Rows that are not among the batch's `sampled` may hold anything.
        """
        ...

    def every(self) -> np.ndarray:
        """Returns the logits of all new tokens, float32 `[rows, new, vocabulary]`; only if asked for."""
        ...


class Runner(Protocol):
    """A model on its devices with its KV blocks.

    Attributes:
        vocabulary: size of the vocabulary.
        block_size: tokens in a KV block.
        blocks: KV blocks there are, `SCRATCH` among them.
        max_length: longest sequence, prompt and answer together, in tokens.
        groups: steps that may be in flight at once (the stages of a pipeline).
        chains: whether a step can be started `after` one whose results nobody has seen yet.
        row_buckets, new_buckets: sizes of `[rows, new]` of steps, ascending; decode steps have new = 1. A
            prefill step may have one row in any case.
        table_buckets: numbers of blocks a step's tables may have, ascending.
        max_tokens: most padded tokens (rows × new) of a prefill step of more than one row.
    """

    vocabulary: int
    block_size: int
    blocks: int
    max_length: int
    groups: int
    chains: bool
    row_buckets: tuple[int, ...]
    new_buckets: tuple[int, ...]
    table_buckets: tuple[int, ...]
    max_tokens: int

    def run(self, batch: StepBatch, every: bool = False) -> Logits:
        """Starts a step and returns its results to come; steps take effect in the order they were started."""
        ...

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies KV blocks, (from, to) each, before the next step: forks part at a half-full block."""
        ...

    def close(self) -> None:
        """Stops what runs and drops the weights and blocks."""
        ...
