"""The engine: requests in, streams out, one thread that schedules, runs and samples."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from autopar.serve.batch import Runner
from autopar.serve.core import Core, Options
from autopar.serve.detokenize import Tokenizer
from autopar.serve.metrics import Meter, Snapshot
from autopar.serve.request import BadParameter, FinishReason, QueueFull, Request, Unavailable
from autopar.serve.sequence import Job
from autopar.serve.stream import Stream

__all__ = ["Engine", "Health", "Options"]

_DEFAULTS = Options()
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Health:
    """How the engine is.

    Attributes:
        state: "ready", "restarting", "draining", "failed" or "closed".
        restarts: times the model was started again. error: the last failure in words, None if there was none.
        since: seconds since that failure, None if there was none.
    """

    state: str
    restarts: int = 0
    error: str | None = None
    since: float | None = None

    @property
    def ok(self) -> bool:
        """Returns whether requests are taken."""
        return self.state in ("ready", "restarting")


class Engine:
    """Serves requests with a model.

    All methods can be called from any thread. One thread of the engine's own runs the steps:
    schedule → run → sample; with a pipeline's several groups the next steps are started before a step's
    results are waited for.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None = None,
        options: Options = _DEFAULTS,
        restart: Callable[[], Runner] | None = None,
    ):
        """Starts the engine's thread.

        Args:
            runner: the model. tokenizer: makes text of tokens; None: pieces carry token ids only.
            options: see `Options`.
            restart: called in the engine's thread after the model failed; closes what is left of it and
                returns a runner like it to go on with. None: the engine stays failed.
        """
        self._tokenizer = tokenizer
        self._options = options
        self._restart = restart
        self._lock = threading.Condition()
        self._inbox: deque[Job] = deque()
        self._inbox_tokens = 0
        self._cancelled: list[str] = []
        self._jobs: dict[str, Job] = {}  # all that have not ended
        self._arrivals = 0
        self._meter = Meter()
        self._state, self._error, self._failed_at = "ready", None, 0.0
        self._lost = (0, 0, 0)  # what former cores counted
        self._core = Core(runner, tokenizer, options, self._meter)
        self._thread = threading.Thread(target=self._loop, name="autopar-engine", daemon=True)
        self._thread.start()

    @property
    def runner(self) -> Runner:
        """Returns the model."""
        return self._core.runner

    @property
    def longest(self) -> int:
        """Returns how many tokens a prompt and its answer may have together."""
        return self._core.longest

    # --- what clients call

    def submit(self, request: Request) -> Stream:
        """Returns the stream of a request's answers.

        Raises:
            BadParameter: a field out of range, or a prompt that leaves no room. QueueFull: too much waits.
            Unavailable: the engine drains, is closed or has failed.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Iterable[Request]) -> list[Stream]:
        """Returns the streams of several requests that are taken together, or not at all.

        They may share their first step, which requests submitted one by one rarely do. Errors as of `submit`.
        """
        jobs: list[Job] = []
        for request in requests:
            stream = Stream(request, functools.partial(self.cancel, request.id))
            jobs.append(self._core.job(request, stream, 0))
        with self._lock:
            self._refuse(jobs)
            for job in jobs:
                self._arrivals += 1
                job.order = self._arrivals
                self._jobs[job.request.id] = job
                self._inbox.append(job)
                self._inbox_tokens += job.tokens
                self._meter.requests += 1
            self._lock.notify_all()
        return [job.stream for job in jobs]

    def cancel(self, id: str) -> None:
        """Ends a request; nothing happens if it is unknown or has ended."""
        with self._lock:
            if id in self._jobs:
                self._cancelled.append(id)
                self._lock.notify_all()

    def metrics(self) -> Snapshot:
        """Returns what the engine has counted so far and how it stands."""
        meter, scheduler, blocks = self._meter, self._core.scheduler, self._core.blocks
        preemptions, queries, hits = self._lost
        return Snapshot(
            queued=len(self._inbox) + scheduler.queued,
            queued_tokens=self._inbox_tokens + scheduler.queued_tokens,
            running=len(scheduler.running),
            preempted=scheduler.waiting - scheduler.queued,
            blocks=blocks.total,
            blocks_held=blocks.held,
            blocks_kept=blocks.kept,
            requests=meter.requests,
            rejected=meter.rejected,
            finished=dict(meter.finished),
            preemptions=preemptions + scheduler.preemptions,
            restarts=meter.restarts,
            steps=meter.steps,
            prompt_tokens=meter.prompt_tokens,
            answer_tokens=meter.answer_tokens,
            prefix_queries=queries + blocks.queries,
            prefix_hits=hits + blocks.hits,
            queue_time=meter.queue_time.snapshot(),
            first_token=meter.first_token.snapshot(),
            inter_token=meter.inter_token.snapshot(),
            latency=meter.latency.snapshot(),
            step_time=meter.step_time.snapshot(),
            batch=meter.batch.snapshot(),
        )

    def health(self) -> Health:
        """Returns how the engine is."""
        since = None if self._error is None else time.monotonic() - self._failed_at
        return Health(self._state, self._meter.restarts, self._error, since)

    def drain(self, timeout: float | None = None) -> bool:
        """Refuses new requests and waits until those taken have ended.

        Args: timeout: seconds to wait at most, None: as long as it takes.

        Returns:
            Whether all have ended.
        """
        with self._lock:
            if self._state in ("ready", "restarting"):
                self._state = "draining"
            return self._lock.wait_for(lambda: not self._jobs, timeout)

    def close(self) -> None:
        """Stops at once: what still runs ends with an error, and the runner is closed."""
        with self._lock:
            if self._state == "closed":
                return
            self._state = "closed"
            self._lock.notify_all()
        self._thread.join()
        self._core.runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- taking requests

    def _refuse(self, jobs: list[Job]) -> None:
        """Raises unless all jobs can be taken together."""
        if self._state not in ("ready", "restarting"):
            reason = f": {self._error}" if self._state == "failed" else ""
            raise Unavailable(f"the engine takes no requests, it is {self._state}{reason}")
        ids = [job.request.id for job in jobs]
        for at, id in enumerate(ids):
            if id in self._jobs or id in ids[:at]:
                raise BadParameter("id", f"{id!r} is of a request under way; give each its own")
        scheduler, most = self._core.scheduler, self._options.queue_tokens
        before = len(self._inbox) + scheduler.queued
        waiting = before + len(jobs)
        tokens = self._inbox_tokens + scheduler.queued_tokens + sum(job.tokens for job in jobs)
        full = waiting > self._options.queue_requests or (most is not None and tokens > most)
        if full and waiting > 1:
            self._meter.rejected += len(jobs)
            after = min(60.0, max(1.0, self._meter.recent_wait))  # what others waited of late
            raise QueueFull(f"the queue is full: {before} requests are waiting", after)

    # --- the loop

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(self._has_work)
                if self._state == "closed":
                    break
                cancelled = self._take()
            try:
                for job in cancelled:
                    self._core.cancel(job)
                self._core.step()
            except Exception as error:  # of the runner, or our own: no stream must hang for it
                _log.exception("a step failed")
                self._recover(error)
            self._forget()
        self._fail(list(self._jobs.values()), "the engine was closed")

    def _has_work(self) -> bool:
        asked = self._inbox or self._cancelled or self._state == "closed"
        return bool(asked) or not self._core.idle

    def _take(self) -> list[Job]:
        """Hands new jobs to the scheduler and returns those to be cancelled."""
        for job in self._inbox:
            self._core.add(job)
        self._inbox.clear()
        self._inbox_tokens = 0
        cancelled = [self._jobs[id] for id in dict.fromkeys(self._cancelled) if id in self._jobs]
        self._cancelled.clear()
        return cancelled

    def _forget(self) -> None:
        """Drops the jobs that have ended."""
        ended = self._core.delivery.take_ended()
        if ended:
            with self._lock:
                for job in ended:
                    self._jobs.pop(job.request.id, None)
                self._lock.notify_all()

    # --- failure

    def _recover(self, error: Exception) -> None:
        """Ends what was under way with an error, starts the model again, and goes on with what waits."""
        words = f"{type(error).__name__}: {error}"
        waiting = self._core.scheduler.jobs_waiting()
        with self._lock:
            self._error, self._failed_at = words, time.monotonic()
            if self._state == "ready":
                self._state = "restarting"
            kept = {*waiting, *self._inbox}
            affected = [job for job in self._jobs.values() if job not in kept]
        self._fail(affected, f"the model failed: {words}")
        try:
            if self._restart is None:
                raise RuntimeError("there is no way to restart it")
            self._renew(self._restart(), waiting)
            with self._lock:
                self._meter.restarts += 1
                if self._state == "restarting":
                    self._state = "ready"
        except Exception as again:
            _log.exception("the model could not be restarted")
            self._give_up(f"{words}; {again}")

    def _renew(self, runner: Runner, waiting: list[Job]) -> None:
        """Goes on with a runner whose blocks are empty, and with no sequences but those that waited."""
        with self._lock:
            before, blocks = self._core.scheduler, self._core.blocks
            counts = before.preemptions, blocks.queries, blocks.hits
            self._lost = tuple(x + y for x, y in zip(self._lost, counts))
            self._core = Core(runner, self._tokenizer, self._options, self._meter)
            for job in waiting:
                self._core.add(job)

    def _give_up(self, error: str) -> None:
        """Ends everything: the model cannot be started again."""
        with self._lock:
            if self._state != "closed":
                self._state = "failed"
            self._error = error
            self._inbox.clear()
            self._inbox_tokens = 0
            jobs = list(self._jobs.values())
        self._fail(jobs, f"the model failed: {error}")
        self._renew(self._core.runner, [])  # it isn't run again

    def _fail(self, jobs: list[Job], error: str) -> None:
        """Ends jobs with an error; their sequences stay where they are, as the core is given up too."""
        delivery = self._core.delivery
        delivery.deliver()
        for job in jobs:
            if not job.done:
                delivery.end(job, FinishReason.ERROR, error)
        delivery.wake()
        self._forget()
