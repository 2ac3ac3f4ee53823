"""A model run through plan, program and runtime: the `Runner` of `serve.batch`, on any unlike stages."""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autopar.api.serving import Loaded, Programs, Shape, text
from autopar.core.errors import BadInput
from autopar.serve.batch import SCRATCH, Ints, StepBatch
from autopar.serve.window import Windows

COPIES = (1, 8, 64)
"""Numbers of blocks that one copying step moves."""


@dataclass(frozen=True)
class Buckets:
    """The shapes of steps that are compiled.

    Attributes:
        rows: sequences in a decode step, ascending.
        new: new tokens of each in a prefill step, ascending, without 1.
        blocks: KV blocks in the tables, ascending; the last holds the longest sequence. A step reads all that
            its table names, so a closer fit is a faster step.
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
        """Returns all shapes, from small to large."""
        decode = [Shape(rows, 1, blocks) for blocks in self.blocks for rows in self.rows]
        prefill = [Shape(r, new, b) for b in self.blocks for new in self.new for r in self.prefill_rows(new)]
        return tuple(sorted((*decode, *prefill), key=lambda s: (s.rows * s.new, s.blocks)))

    def scoring(self) -> tuple[Shape, ...]:
        """Returns the shapes of prefill steps that give the logits of all tokens, over the longest tables."""
        most = self.blocks[-1]
        return tuple(Shape(r, new, most, True) for new in self.new for r in self.prefill_rows(new))

    def covering(self) -> tuple[Shape, ...]:
        """Returns shapes that hold every step, and the ones that a single sequence takes."""
        most = self.blocks[-1]
        large = [Shape(self.prefill_rows(new)[-1], new, most) for new in self.new]
        large.append(Shape(self.rows[-1], 1, most))
        return tuple(dict.fromkeys([*large, Shape(self.rows[0], 1, most), Shape(1, self.new[-1], most)]))

    def prefill_rows(self, new: int) -> tuple[int, ...]:
        """Returns the numbers of rows that prefill steps of so many new tokens have: one, or all that fit."""
        return tuple(sorted({1, max([1, *(r for r in self.rows if r * new <= self.tokens)])}))


class CompiledRunner:
    """See `serve.batch.Runner`. Every step of a shape is one program; all share parameters and cache.

    Args:
        programs: of the model, with parameters placed.
        buckets: the shapes there are.
        vocabulary, max_length: of the model.
        groups: steps that may be in flight at once; None: one per stage.
        window: tokens that a window of decode steps may hold beside the cache (see `serve.window`).
    """

    def __init__(
        self,
        programs: Programs,
        buckets: Buckets,
        vocabulary: int,
        max_length: int,
        groups: int | None = None,
        window: int = 0,
    ):
        self.programs, self.buckets = programs, buckets
        self.vocabulary = vocabulary
        self.block_size, self.blocks = programs.served.block_size, programs.served.blocks
        usable = (self.blocks - 1) * self.block_size
        self.max_length = min(max_length, usable, buckets.blocks[-1] * self.block_size)
        stages = len(programs.base.made.plan.stages)
        self.groups = groups or stages
        self.chains = self.groups == stages == 1 and getattr(programs.base.session, "local", False)
        self.row_buckets, self.table_buckets = buckets.rows, buckets.blocks
        self.new_buckets = (1, *buckets.new)
        self.max_tokens = buckets.tokens
        self._windows = Windows(programs, window, self.block_size)
        self._ready: list[Shape] = []
        self._chosen: dict[Shape, tuple[Loaded, Shape]] = {}
        self._behind: threading.Thread | None = None
        self._closed = False

    def compile(
        self, say: Callable[[str], None] = lambda words: None, behind: bool = False, threads: int = 1
    ) -> CompiledRunner:
        """Compiles every shape ahead of serving; returns the runner itself.

        Args:
            say: told how far it has come.
            behind: return when there is a shape that holds each possible step, and compile the others, which
                hold it with less padding, in a thread.
            threads: how many compile.
        """
        first, shapes = self.buckets.covering(), self.buckets.shapes()
        others = *shapes, *self._windows.shapes(shapes), *self.buckets.scoring()
        first, others = [*first, *COPIES], [shape for shape in others if shape not in first]
        self._compile(first if behind else [*first, *others], say, threads)
        if behind:
            quiet: Callable[[str], None] = lambda words: None  # noqa: E731
            self._behind = threading.Thread(target=self._compile, args=(others, quiet, 1), daemon=True)
            self._behind.start()
        return self

    def wait(self) -> None:
        """Waits until the shapes that are compiled behind are there."""
        if self._behind is not None:
            self._behind.join()

    def _compile(self, keys: Sequence[Shape | int], say: Callable[[str], None], threads: int) -> None:
        count = itertools.count(1)

        def one(key: Shape | int) -> None:
            if self._closed:
                return
            self.programs.compiled(key)
            say(f"{next(count)} of {len(keys)} compiled: {text(key)}")
            if isinstance(key, Shape) and key.window:
                self._windows.add(key)
            elif isinstance(key, Shape):
                self._ready = sorted({*self._ready, key}, key=lambda s: (s.rows * s.new, s.blocks))
                self._chosen = {}

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, keys))

    def run(self, batch: StepBatch, every: bool = False) -> Results:
        """Starts a step and returns its results to come.

        Raises:
            BadInput: a batch larger than the largest bucket. StageFailed: a worker is lost.
        """
        rows, new = batch.tokens.shape
        loaded, shape = self._loaded(Shape(rows, new, batch.tables.shape[1], every))
        arrays = _padded(batch, shape)
        if batch.after is not None:
            assert isinstance(batch.after, Results), "a step after one of this runner"
            arrays = batch.after.tokens(), *arrays[1:]
        loaded = self._windows.step(shape, arrays, batch.sampled == ()) or loaded
        loaded(arrays)
        return Results(loaded, batch, every)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies KV blocks, (from, to) each, before the next step."""
        self._windows.forget()
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
            self.wait()
            self.programs.close()

    def _loaded(self, wanted: Shape) -> tuple[Loaded, Shape]:
        """The smallest compiled step that holds a batch of these sizes."""
        chosen = self._chosen
        if wanted not in chosen:
            chosen[wanted] = self._choose(wanted)
        return chosen[wanted]

    def _choose(self, wanted: Shape) -> tuple[Loaded, Shape]:
        ready = [shape for shape in self._ready if shape.every == wanted.every]
        others = [shape._replace(every=wanted.every) for shape in self.buckets.shapes()]  # compiled for it
        for shape in [*ready, *others]:
            decode = shape.new == wanted.new or wanted.new > 1  # a decode step is not padded to a prompt's
            if decode and all(have >= want for have, want in zip(shape[:3], wanted[:3])):
                return self.programs.compiled(shape), shape
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

    def __init__(self, loaded: Loaded, batch: StepBatch, every: bool):
        self._lengths, self._every = batch.lengths, every
        self._rows, self._sampled = len(batch.lengths), None if every else batch.sampled
        real = np.count_nonzero(batch.lengths)
        fetches_tokens = not every and (self._sampled is None or len(self._sampled) < real or not real)
        self._tokens = loaded.fetch(0) if fetches_tokens else None
        self._logits = None if self._sampled == () else loaded.fetch(0 if every else 1, self._sampled)

    def tokens(self) -> Any:
        """Returns the likeliest next tokens where they are made, `[rows, 1]` as a step takes them."""
        assert self._tokens is not None, "likeliest tokens of a step that was to be sampled"
        return self._tokens().reshape(-1, 1)

    def greedy(self) -> Ints:
        """Returns the likeliest next token of each row, int32 `[rows]` (the lowest id among equals)."""
        if self._tokens is None:
            return self.last().argmax(-1).astype(np.int32)
        return np.asarray(self._tokens())[: self._rows]

    def last(self) -> np.ndarray:
        """Returns the logits after each row's last real token, float32 `[rows, vocabulary]`."""
        if not self._every:
            return self._spread()
        at = np.maximum(self._lengths - 1, 0)
        return self.every()[np.arange(self._rows), at]

    def every(self) -> np.ndarray:
        """Returns the logits of all new tokens, float32 `[rows, new, vocabulary]`; only if asked for."""
        if not self._every:
            raise BadInput("the logits of all tokens were not asked for: run(batch, every=True)")
        return self._waited()[: self._rows]

    def _spread(self) -> np.ndarray:
        """The logits of the rows that were asked for, in their places."""
        found = self._waited()
        if self._sampled is None or len(found) != len(self._sampled):
            return found[: self._rows]  # all of them, in this process
        logits = np.empty((self._rows, found.shape[1]), found.dtype)
        logits[list(self._sampled)] = found
        return logits

    def _waited(self) -> np.ndarray:
        assert self._logits is not None, "logits of a step that was to choose likeliest tokens only"
        return np.asarray(self._logits())


def table_buckets(longest: int, block_size: int, fine: bool = False) -> tuple[int, ...]:
    """Returns numbers of blocks for tables: of a quarter of the longest sequence, and of all of it.

    fine: of an eighth, a sixteenth and half of that as well.
    """
    most = -(-longest // block_size)
    shares = (32, 16, 8, 4, 1) if fine else (4, 1)
    return tuple(sorted({max(1, -(-most // share)) for share in shares}))
