"""A step: some sequences' next tokens in the shape of one of the runner's buckets."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from autopar.core.errors import BadInput
from autopar.serve.batch import Logits, Runner, StepBatch
from autopar.serve.sequence import Sequence


@dataclass(frozen=True)
class Row:
    """A sequence's part of a step.

    Attributes:
        start: index of the first token computed. length: how many are.
        epoch: the sequence's when the step was made; if it differs later, the result is stale.
        samples: whether the next token is to be chosen from the row's last logits.
    """

    sequence: Sequence
    epoch: int
    start: int
    length: int
    samples: bool

    @property
    def fresh(self) -> bool:
        """Returns whether the sequence still holds the blocks that it had."""
        return self.epoch == self.sequence.epoch


@dataclass(frozen=True)
class Step:
    """Rows to run together, as a batch; `copies` of blocks come before; `every`: all logits are wanted."""

    rows: tuple[Row, ...]
    batch: StepBatch
    copies: tuple[tuple[int, int], ...]
    every: bool

    @property
    def reads(self) -> bool:
        """Returns whether it is a prefill step."""
        return self.batch.tokens.shape[1] > 1


@dataclass(frozen=True)
class Shapes:
    """The shapes that a runner has ready, and how they are used.

    Attributes:
        rows, new, tables: bucket sizes, ascending; new: those of prefill steps, above 1.
        budget: most padded tokens (rows × new) of a prefill step; one row is always allowed.
        groups: steps in flight at once.
    """

    rows: tuple[int, ...]
    new: tuple[int, ...]
    tables: tuple[int, ...]
    budget: int
    groups: int

    @staticmethod
    def of(runner: Runner, budget: int | None = None) -> Shapes:
        """Returns a runner's shapes; `budget` as `Options.prefill_tokens`."""
        budget = budget or runner.max_tokens
        new = tuple(size for size in runner.new_buckets if size > 1)  # of prefill steps
        if not new:
            raise BadInput("the runner has no bucket for more than one new token; it needs one for prompts")
        return Shapes(runner.row_buckets, new, runner.table_buckets, budget, runner.groups)


def bucket(sizes: tuple[int, ...], size: int) -> int:
    """Returns the smallest of the ascending `sizes` that is no less than `size`."""
    return sizes[bisect_left(sizes, size)]


def batch_of(
    chosen: list[tuple[Sequence, int]], new: int, shapes: Shapes, block_size: int, after: Logits | None = None
) -> StepBatch:
    """Returns the arrays of a step; new ones each time, as the runner may still be reading the last step's.

    Args:
        chosen: sequences, and how many of each one's next tokens are computed. new: the bucket for these.
        after: where the tokens come from if they are not known yet.
    """
    alone = new > 1 and len(chosen) == 1  # which has steps of its own, however few rows others may have
    rows = 1 if alone else bucket(shapes.rows, len(chosen))
    used = [-(-(sequence.computed + length) // block_size) for sequence, length in chosen]
    tables = np.zeros((rows, bucket(shapes.tables, max(used))), np.int32)
    tokens = np.zeros((rows, new), np.int32)
    positions = np.zeros(rows, np.int32)
    lengths = np.zeros(rows, np.int32)
    positions[: len(chosen)] = [sequence.computed for sequence, _ in chosen]
    lengths[: len(chosen)] = [length for _, length in chosen]
    for row, (sequence, length) in enumerate(chosen):
        start = sequence.computed
        if after is None:
            tokens[row, :length] = sequence.tokens[start : start + length]
        tables[row, : used[row]] = sequence.table[: used[row]]
    return StepBatch(tokens, positions, lengths, tables, after=after)
