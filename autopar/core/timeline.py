"""A timeline: what each worker did when, predicted by the simulator or measured by a backend."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Event:
    """One instruction in time. start, stop: seconds since the step began. microbatch: None if once a step."""

    worker: int
    name: str
    kind: str
    start: float
    stop: float
    microbatch: int | None = None


@dataclass(frozen=True)
class Timeline:
    """Events of one step.

    Attributes:
        events: in order of start.
        workers: a name per worker for people ("stage 0 · A100-40GB 1×4").
        peak: bytes per device at the worst moment, per worker.
    """

    events: tuple[Event, ...]
    workers: tuple[str, ...]
    peak: tuple[int, ...] = ()

    @property
    def step_time(self) -> float:
        """Seconds from the first event's start to the last one's end."""
        return max((e.stop for e in self.events), default=0.0) - min(
            (e.start for e in self.events), default=0.0
        )

    def busy(self, worker: int) -> float:
        """Returns the seconds in which the worker computes (kind "run" or "accumulate")."""
        return sum(
            e.stop - e.start for e in self.events if e.worker == worker and e.kind in ("run", "accumulate")
        )

    @property
    def bubble(self) -> float:
        """The share of all workers' time in which they do not compute, 0..1."""
        total = self.step_time * len(self.workers)
        return 1 - sum(self.busy(w) for w in range(len(self.workers))) / total if total else 0.0
