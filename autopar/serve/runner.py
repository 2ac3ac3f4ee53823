"""A model run through plan, program and runtime: the `Runner` of `serve.batch`, on any unlike stages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from autopar.api.serving import Loaded, Programs, Shape, text
from autopar.core.errors import BadInput
from autopar.serve.batch import SCRATCH, Ints, StepBatch

COPIES = (1, 8, 64)
"""Numbers of blocks that one copying step moves."""


@dataclass(frozen=True)
class Buckets:
    """The shapes of steps that are compiled.

    Attributes:
        rows: sequences in a decode step, ascending.
        new: new tokens of each in a prefill step, ascending, without 1.
        blocks: KV blocks in the tables, ascending; the last holds the longest sequence.
        tokens: most new tokens of a step, all rows together.
    """

    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    new: tuple[int, ...] = (16, 64, 256)
    blocks: tuple[int, ...] = (16, 64)
    tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("rows", "new", "blocks"):
            sizes = getattr(self, name)
            if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
                raise BadInput(f"buckets: {name} must be rising numbers of at least 1, got {sizes}")
        if self.tokens < max(self.new):
            raise BadInput(
                f"buckets: a step of {self.tokens} tokens has no room for {max(self.new)} of a prompt"
            )

    def shapes(self) -> tuple[Shape, ...]:
        """Returns all shapes, decode steps first."""
        decode = [Shape(rows, 1, blocks) for blocks in self.blocks for rows in self.rows]
        prefill = [Shape(r, new, b) for b in self.blocks for new in self.new for r in self.prefill_rows(new)]
        return (*decode, *prefill)

    def prefill_rows(self, new: int) -> tuple[int, ...]:
        """Returns the numbers of rows that prefill steps of so many new tokens have."""
        fitting = [1, *(r for r in self.rows[1:] if r * new <= self.tokens)]
        return tuple(sorted({*fitting[::2], fitting[-1]}))  # every other: a step is padded to at most 4 ×


class CompiledRunner:
    """See `serve.batch.Runner`. Every step of a shape is one program; all share parameters and cache.

    Args:
        programs: of the model, with parameters placed.
        buckets: the shapes there are.
        vocabulary, max_length: of the model.
        groups: steps that may be in flight at once; None: one per stage.
    """

    def __init__(
        self,
        programs: Programs,
        buckets: Buckets,
        vocabulary: int,
        max_length: int,
        groups: int | None = None,
    ):
        self.programs, self.buckets = programs, buckets
        self.vocabulary = vocabulary
        self.block_size, self.blocks = programs.served.block_size, programs.served.blocks
        usable = (self.blocks - 1) * self.block_size
        self.max_length = min(max_length, usable, buckets.blocks[-1] * self.block_size)
        self.groups = groups or len(programs.base.made.plan.stages)
        self.row_buckets, self.table_buckets = buckets.rows, buckets.blocks
        self.new_buckets = (1, *buckets.new)
        self.max_tokens = buckets.tokens
        self._shapes = sorted(buckets.shapes(), key=lambda s: (s.rows * s.new, s.blocks))
        self._closed = False

    def compile(self, say: Callable[[str], None] = lambda words: None) -> CompiledRunner:
        """Compiles every shape ahead of serving; returns the runner itself. say: told how far it has come."""
        todo: list[Shape | int] = [*self._shapes, *COPIES]
        for n, key in enumerate(todo):
            say(f"{n + 1} of {len(todo)}: {text(key)}")
            self.programs.compiled(key)
        return self

    def run(self, batch: StepBatch, every: bool = False) -> Results:
        """Starts a step and returns its results to come.

        Raises:
            BadInput: a batch larger than the largest bucket. StageFailed: a worker is lost.
        """
        rows, new = batch.tokens.shape
        loaded, shape = self._loaded(Shape(rows, new, batch.tables.shape[1], every))
        loaded(_padded(batch, shape))
        return Results(loaded, batch.lengths, every)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies KV blocks, (from, to) each, before the next step."""
        left = list(pairs)
        while left:
            size = next((n for n in COPIES if n >= len(left)), COPIES[-1])
            now, left = left[:size], left[size:]
            ends = np.full((size, 2), SCRATCH, np.int32)
            ends[: len(now)] = now
            self.programs.compiled(size)([np.ascontiguousarray(ends[:, 0]), np.ascontiguousarray(ends[:, 1])])

    def close(self) -> None:
        """Stops what runs and drops the weights and blocks."""
        if not self._closed:
            self._closed = True
            self.programs.close()

    @functools.cache  # noqa: B019 (a runner lives as long as its process serves)
    def _loaded(self, wanted: Shape) -> tuple[Loaded, Shape]:
        """The smallest compiled step that holds a batch of these sizes."""
        for shape in self._shapes:
            decode = shape.new == wanted.new or wanted.new > 1  # a decode step is not padded to a prompt's
            if decode and all(have >= want for have, want in zip(shape[:3], wanted[:3])):
                found = shape._replace(every=wanted.every)
                return self.programs.compiled(found), found
        raise BadInput(
            f"a step of {wanted.rows} × {wanted.new} tokens over {wanted.blocks} blocks is larger than any "
            f"that was compiled; at most {self.buckets.tokens} tokens, {self.row_buckets[-1]} rows, "
            f"{self.new_buckets[-1]} new tokens a row and {self.table_buckets[-1]} blocks"
        )


def _padded(batch: StepBatch, shape: Shape) -> tuple[Ints, Ints, Ints, Ints]:
    """The batch's arrays in a compiled step's sizes: rows of no tokens, and tables that end in scratch."""
    arrays = batch.tokens, batch.positions, batch.lengths, batch.tables
    sizes = (shape.rows, shape.new), (shape.rows,), (shape.rows,), (shape.rows, shape.blocks)
    return tuple(_grown(x, size) for x, size in zip(arrays, sizes, strict=True))  # type: ignore[return-value]


def _grown(x: Ints, size: tuple[int, ...]) -> Ints:
    if x.shape == size:
        return x
    out = np.zeros(size, np.int32)  # 0 is no token, position or length, and SCRATCH
    out[tuple(slice(n) for n in x.shape)] = x
    return out


assert SCRATCH == 0, "_grown pads tables with zeros"


class Results:
    """Results of one step, which may still be running; see `serve.batch.Logits`."""

    def __init__(self, loaded: Loaded, lengths: Ints, every: bool):
        self._lengths, self._every = lengths, every
        self._waits = loaded.fetch()

    @property
    def _rows(self) -> int:
        return len(self._lengths)

    def greedy(self) -> Ints:
        """Returns the likeliest next token of each row, int32 `[rows]` (the lowest id among equals)."""
        if self._every:
            return self.last().argmax(-1).astype(np.int32)
        return self._fetched(0)[: self._rows]

    def last(self) -> np.ndarray:
        """Returns the logits after each row's last real token, float32 `[rows, vocabulary]`."""
        if not self._every:
            return self._fetched(1)[: self._rows]
        at = np.maximum(self._lengths - 1, 0)
        return self.every()[np.arange(self._rows), at]

    def every(self) -> np.ndarray:
        """Returns the logits of all new tokens, float32 `[rows, new, vocabulary]`; only if asked for."""
        if not self._every:
            raise BadInput("the logits of all tokens were not asked for: run(batch, every=True)")
        return self._fetched(0)[: self._rows]

    def _fetched(self, k: int) -> np.ndarray:
        return np.asarray(self._waits[k]())


def table_buckets(longest: int, block_size: int) -> tuple[int, ...]:
    """Returns numbers of blocks for tables: of a quarter of the longest sequence, and of all of it."""
    most = -(-longest // block_size)
    return tuple(sorted({max(1, -(-most // 4)), most}))
