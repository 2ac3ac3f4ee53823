"""What the engine counts: histograms and a snapshot of them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class Distribution:
    """A histogram's state.

    Attributes:
        bounds: upper bounds of the bins, ascending; one bin more holds what is above the last.
        counts: observations in each bin. sum: of all observations.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """Returns how many observations there are."""
        return sum(self.counts)


class Histogram:
    """Counts observations by size."""

    def __init__(self, bounds: Sequence[float]):
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Counts an observation."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def snapshot(self) -> Distribution:
        """Returns the state now."""
        return Distribution(self._bounds, tuple(self._counts), self._sum)


@dataclass(frozen=True)
class Snapshot:
    """The engine at a moment; all that counts events counts since its start.

    Attributes:
        queued: requests not admitted yet, and queued_tokens their prompts' and longest answers' tokens.
        running, preempted: sequences that hold blocks, and those that wait to be computed anew.
        blocks, blocks_held, blocks_kept: KV blocks there are, held by sequences, kept for prefixes to come.
        requests, rejected: requests taken and those refused because the queue was full.
        finished: requests by the reason their first answer ended.
        preemptions: times a sequence had to give its blocks away.
        restarts: times the model was started again.
        steps: of the model. prompt_tokens, answer_tokens: tokens read (cached ones among them) and written.
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found.
        queue_time, first_token, inter_token, latency, step_time: seconds from arrival to admission, from
            arrival to the first token, between tokens, from arrival to the end, and per step.
        batch: rows per step.
    """

    queued: int
    queued_tokens: int
    running: int
    preempted: int
    blocks: int
    blocks_held: int
    blocks_kept: int
    requests: int
    rejected: int
    finished: dict[str, int]
    preemptions: int
    restarts: int
    steps: int
    prompt_tokens: int
    answer_tokens: int
    prefix_queries: int
    prefix_hits: int
    queue_time: Distribution
    first_token: Distribution
    inter_token: Distribution
    latency: Distribution
    step_time: Distribution
    batch: Distribution


class Meter:
    """The counters and histograms behind a snapshot."""

    def __init__(self) -> None:
        self.requests = self.rejected = self.restarts = self.steps = 0
        self.prompt_tokens = self.answer_tokens = 0
        self.finished: dict[str, int] = {}
        self.queue_time = Histogram(SECONDS)
        self.first_token = Histogram(SECONDS)
        self.inter_token = Histogram(SECONDS)
        self.latency = Histogram(SECONDS)
        self.step_time = Histogram(SECONDS)
        self.batch = Histogram(ROWS)
        self.recent_wait = 0.0  # seconds that requests waited of late

    def add_wait(self, seconds: float) -> None:
        """Counts the time that a request waited to be admitted."""
        self.queue_time.add(seconds)
        self.recent_wait += 0.1 * (seconds - self.recent_wait)
