"""A model for tests of the engine: its logits depend on the whole history as the KV blocks hold it."""

from __future__ import annotations

import functools
import threading
import time
from dataclasses import dataclass, field, replace

import numpy as np

from autopar.serve.batch import SCRATCH, StepBatch

UNWRITTEN = -1


def history_hashes(history: np.ndarray) -> np.ndarray:
    """A hash of the history up to each token."""
    return _hashes(tuple(history.tolist()))


@functools.lru_cache(1 << 16)
def _hashes(history: tuple[int, ...]) -> np.ndarray:
    if not history:
        return np.zeros(0, np.uint64)
    before = _hashes(history[:-1])
    last = int(before[-1]) if len(before) else 1469598103934665603  # FNV-1a, token by token
    return np.append(before, np.uint64(((last ^ (history[-1] + 1)) * 1099511628211) % 2**64))


def history_logits(history: np.ndarray, vocabulary: int, sharpness: float = 3.0) -> np.ndarray:
    """Logits that differ for every history: a hash of it seeds them."""
    return _logits(int(history_hashes(history)[-1]), vocabulary, sharpness)


@functools.lru_cache(1 << 16)
def _logits(seed: int, vocabulary: int, sharpness: float) -> np.ndarray:
    values = np.random.Generator(np.random.Philox(seed)).standard_normal(vocabulary)
    return (values * sharpness).astype(np.float32)


class FakeLogits:
    """Results that are computed when the step is started and counted when they are fetched."""

    def __init__(
        self,
        runner: FakeRunner,
        last: np.ndarray,
        every: np.ndarray | None,
        sampled: tuple[int, ...] | None = None,
    ):
        self._runner, self._last, self._every, self._sampled = runner, last, every, sampled

    def _wait(self) -> None:
        if self._runner.fail_wait:
            raise RuntimeError(self._runner.fail_wait)
        if not self._runner.gate.is_set():
            self._runner.gate.wait(10)

    def greedy(self) -> np.ndarray:
        self._wait()
        return self._last.argmax(1).astype(np.int32)

    def last(self) -> np.ndarray:
        self._wait()
        self._runner.transfers += 1
        if self._sampled is None:
            return self._last
        found = np.full_like(self._last, np.nan)  # nobody may look at what was not asked for
        found[list(self._sampled)] = self._last[list(self._sampled)]
        return found

    def every(self) -> np.ndarray:
        self._wait()
        assert self._every is not None, "only if it was asked for"
        return self._every


@dataclass
class FakeRunner:
    """Stores each token in its block at its place and hashes what it finds there.

    Wrong tables, lengths or copies and blocks that are taken too early change the logits.

    Attributes:
        transfers: times that logits were fetched. steps: shapes of the steps run. closed: whether it was.
        fail_run, fail_wait: raise this when a step is started or waited for.
        gate: holds results back while cleared.
        delay: seconds per step.
    """

    vocabulary: int = 50
    block_size: int = 4
    blocks: int = 33
    max_length: int = 64
    groups: int = 1
    chains: bool = False
    row_buckets: tuple[int, ...] = (1, 2, 4, 8)
    new_buckets: tuple[int, ...] = (1, 4, 16)
    table_buckets: tuple[int, ...] = (2, 4, 8, 16)
    max_tokens: int = 0
    delay: float = 0.0
    fail_run: str = ""
    fail_wait: str = ""
    transfers: int = 0
    copied: int = 0
    chained: int = 0
    closed: bool = False
    steps: list[tuple[int, int, int]] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()
        self.max_tokens = self.max_tokens or max(self.new_buckets[-1], self.row_buckets[-1])
        self.pool = np.full((self.blocks, self.block_size), UNWRITTEN, np.int64)
        self.contexts = np.zeros((self.blocks, self.block_size), np.uint64)

    def logits(self, history: np.ndarray) -> np.ndarray:
        """The logits of the token after a history."""
        return history_logits(history, self.vocabulary)

    def run(self, batch: StepBatch, every: bool = False) -> FakeLogits:
        if self.fail_run:
            raise RuntimeError(self.fail_run)
        if self.delay:
            time.sleep(self.delay)
        rows, new = batch.tokens.shape
        assert rows in self.row_buckets or (rows == 1 and new > 1)
        assert new in (1, *self.new_buckets)
        assert batch.tables.shape[1] in self.table_buckets and batch.tables.shape[0] == rows
        assert {batch.tokens.dtype, batch.positions.dtype, batch.lengths.dtype, batch.tables.dtype} == {
            np.dtype(np.int32)
        }
        self.steps.append((rows, new, batch.tables.shape[1]))
        if batch.after is not None:
            assert self.chains and new == 1
            batch = replace(batch, tokens=batch.after._last.argmax(1).astype(np.int32)[:, None])
            self.chained += 1
        self._write(batch)
        last = np.zeros((rows, self.vocabulary), np.float32)
        all_of_them = np.zeros((rows, new, self.vocabulary), np.float32) if every else None
        for row in range(rows):
            length, start = int(batch.lengths[row]), int(batch.positions[row])
            if length == 0:
                continue
            history = self.pool[batch.tables[row]].reshape(-1)[: start + length]
            assert (history != UNWRITTEN).all(), "reads what was never written"
            self._check(batch.tables[row], history, start)
            last[row] = self.logits(history)
            if all_of_them is not None:
                for at in range(length):
                    all_of_them[row, at] = self.logits(history[: start + at + 1])
        return FakeLogits(self, last, all_of_them, batch.sampled)

    def _check(self, table: np.ndarray, history: np.ndarray, start: int) -> None:
        """Asserts that what is read was written after the same tokens: a real state depends on them."""
        hashes = history_hashes(history)
        kept = self.contexts[table].reshape(-1)[:start]
        assert (kept == hashes[:start]).all(), "reads what was written after another history"
        for at in range(start, len(history)):
            block, offset = divmod(at, self.block_size)
            self.contexts[table[block], offset] = hashes[at]

    def _write(self, batch: StepBatch) -> None:
        written: set[tuple[int, int]] = set()
        for row in range(len(batch.lengths)):
            for at in range(int(batch.lengths[row])):
                block, offset = divmod(int(batch.positions[row]) + at, self.block_size)
                place = int(batch.tables[row, block]), offset
                assert place[0] != SCRATCH, "a real token is written to the scratch block"
                assert place not in written, "two rows write to one place"
                written.add(place)
                self.pool[place] = batch.tokens[row, at]

    def copy(self, pairs) -> None:
        pairs = list(pairs)
        targets = [target for _, target in pairs]
        assert len(set(targets)) == len(targets) and SCRATCH not in targets
        sources = [source for source, _ in pairs]
        self.pool[targets] = self.pool[sources]
        self.contexts[targets] = self.contexts[sources]
        self.copied += len(pairs)

    def close(self) -> None:
        self.closed = True


class ByteTokenizer:
    """Token n is the byte n % 256; ids from 256 on are special and have no text."""

    def decode(self, ids) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def greedy_answer(prompt, count: int, vocabulary: int = 50) -> list[int]:
    """What a model with `history_logits` answers greedily."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(history_logits(np.array(tokens), vocabulary).argmax()))
    return tokens[len(prompt) :]
