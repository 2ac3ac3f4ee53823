"""What Prometheus reads: the engine's figures, and what the service itself counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from autopar.serve.metrics import Distribution, Snapshot

GAUGES: dict[str, tuple[str, Callable[[Snapshot], float]]] = {
    "requests_running": ("Sequences that hold KV blocks", lambda s: s.running),
    "requests_waiting": ("Requests in the queue", lambda s: s.queued),
    "requests_preempted": ("Sequences that wait to be computed anew", lambda s: s.preempted),
    "queue_tokens": ("Tokens that the requests in the queue may need", lambda s: s.queued_tokens),
    "kv_use_ratio": (
        "Share of the KV blocks that sequences hold",
        lambda s: s.blocks_held / max(1, s.blocks),
    ),
    "kv_blocks": ("KV blocks there are", lambda s: s.blocks),
    "kv_blocks_kept": ("KV blocks kept for prefixes to come", lambda s: s.blocks_kept),
}
COUNTERS: dict[str, tuple[str, Callable[[Snapshot], float]]] = {
    "requests": ("Requests taken", lambda s: s.requests),
    "prompt_tokens": ("Tokens of prompts", lambda s: s.prompt_tokens),
    "generated_tokens": ("Tokens generated", lambda s: s.answer_tokens),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", lambda s: s.prefix_queries),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache", lambda s: s.prefix_hits),
    "preemptions": ("Times a sequence had to give its KV blocks away", lambda s: s.preemptions),
    "restarts": ("Times the model was started again", lambda s: s.restarts),
    "steps": ("Steps of the model", lambda s: s.steps),
}
HISTOGRAMS: dict[str, tuple[str, Callable[[Snapshot], Distribution]]] = {
    "queue_seconds": ("From arrival to admission", lambda s: s.queue_time),
    "time_to_first_token_seconds": ("From arrival to the first token", lambda s: s.first_token),
    "inter_token_seconds": ("Between the tokens of a sequence", lambda s: s.inter_token),
    "request_seconds": ("From arrival to the end", lambda s: s.latency),
    "step_seconds": ("Time of a step", lambda s: s.step_time),
    "batch_size": ("Sequences in a step", lambda s: s.batch),
}


class _Engine(Collector):
    """The engine's own figures, read when they are asked for."""

    def __init__(self, snapshot: Callable[[], Snapshot]):
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        found = self._snapshot()
        for name, (text, read) in GAUGES.items():
            yield GaugeMetricFamily(f"autopar_{name}", text, value=read(found))
        for name, (text, read) in COUNTERS.items():
            yield CounterMetricFamily(f"autopar_{name}", text, value=read(found))
        for name, (text, spread) in HISTOGRAMS.items():
            yield _histogram(f"autopar_{name}", text, spread(found))
        finished = CounterMetricFamily(
            "autopar_finished_requests", "Requests by how they ended", labels=["reason"]
        )
        for reason, count in found.finished.items():
            finished.add_metric([reason], count)
        yield finished


def _histogram(name: str, text: str, found: Distribution) -> Metric:
    total, buckets = 0, list[tuple[str, float]]()
    for bound, count in zip((*map(str, found.bounds), "+Inf"), found.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=found.sum)


class Metrics:
    """All figures, in a registry of their own.

    Args:
        snapshot: gives the engine's.
    """

    def __init__(self, snapshot: Callable[[], Snapshot]):
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(snapshot))
        self._rejected = self._counter("rejections", "Requests refused before they began", "reason")
        self._responses = self._counter("responses", "HTTP responses", "path", "status")
        self._unfinished = self._counter(
            "unfinished_requests", "HTTP requests whose client left or that failed"
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"autopar_{name}", text, labels, registry=self._registry)

    def rejected(self, reason: str) -> None:
        """Counts a request refused for `reason`."""
        self._rejected.labels(reason).inc()

    def responded(self, path: str, status: int) -> None:
        """Counts an HTTP response."""
        self._responses.labels(path, status).inc()

    def unfinished(self) -> None:
        """Counts an HTTP request that did not come to its end."""
        self._unfinished.inc()

    def text(self) -> bytes:
        """Returns everything in Prometheus's text format."""
        return generate_latest(self._registry)
