"""What Prometheus reads: counters and histograms of the service, gauges of the engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
GAUGES = (
    ("running", "autopar_sequences_running", "Sequences being generated"),
    ("waiting", "autopar_sequences_waiting", "Sequences in the queue"),
    ("kv_use", "autopar_kv_cache_use_ratio", "Share of the KV cache's blocks in use"),
    ("batch_size", "autopar_batch_size", "Sequences in the last step"),
)
COUNTERS = (
    ("prompt_tokens", "autopar_prompt_tokens", "Tokens of prompts"),
    ("generated_tokens", "autopar_generated_tokens", "Tokens generated"),
    ("cached_tokens", "autopar_cached_prompt_tokens", "Tokens of prompts that the prefix cache held"),
    ("preemptions", "autopar_preemptions", "Sequences that lost their blocks and began again"),
    ("steps", "autopar_steps", "Forward passes"),
)


class _Engine(Collector):
    """The engine's own figures, read when they are asked for."""

    def __init__(self, snapshot: Callable[[], Any]):
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        found = self._snapshot()
        for attribute, name, text in GAUGES:
            yield GaugeMetricFamily(name, text, value=getattr(found, attribute))
        for attribute, name, text in COUNTERS:
            yield CounterMetricFamily(name, text, value=getattr(found, attribute))


class Metrics:
    """The service's figures, in a registry of their own.

    Args:
        snapshot: gives the engine's figures.
    """

    def __init__(self, snapshot: Callable[[], Any]):
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(snapshot))
        self._first = self._histogram("time_to_first_token", "From a request's arrival to its first token")
        self._between = self._histogram("inter_token", "Between a choice's tokens")
        self._whole = self._histogram("request", "From a request's arrival to its last token")
        self._rejected = self._counter("rejections", "Requests refused before they began", "reason")
        self._responses = self._counter("responses", "HTTP responses", "path", "status")
        self._cancelled = self._counter("cancelled_requests", "Requests whose clients hung up or that failed")

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"autopar_{name}_seconds", text, buckets=SECONDS, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"autopar_{name}", text, labels, registry=self.registry)

    def rejected(self, reason: str) -> None:
        """Counts a request refused for `reason`."""
        self._rejected.labels(reason).inc()

    def responded(self, path: str, status: int) -> None:
        """Counts an HTTP response."""
        self._responses.labels(path, status).inc()

    def cancelled(self) -> None:
        """Counts a request that did not come to its end."""
        self._cancelled.inc()

    def tokens(self, arrival: float, before: float | None, count: int) -> float:
        """Notes that `count` tokens of a choice came now.

        Args:
            arrival: when the request came, on the clock of `time.monotonic`.
            before: when the choice's last tokens did, or None.

        Returns:
            now, to be handed in with the choice's next tokens.
        """
        now = time.monotonic()
        if before is None:
            self._first.observe(now - arrival)
        else:
            for _ in range(count):
                self._between.observe((now - before) / count)
        return now

    def finished(self, arrival: float) -> None:
        """Notes that a choice came to its end."""
        self._whole.observe(time.monotonic() - arrival)

    def text(self) -> bytes:
        """Returns everything in Prometheus's text format."""
        return generate_latest(self.registry)
