"""The engine: requests in, streams out, one thread that schedules, runs and samples."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from autopar.serve.batch import Logits, Runner
from autopar.serve.blocks import BlockManager, root
from autopar.serve.delivery import Delivery
from autopar.serve.detokenize import Tokenizer
from autopar.serve.metrics import Meter, Snapshot
from autopar.serve.request import BadParameter, FinishReason, QueueFull, Request, Unavailable
from autopar.serve.results import Results
from autopar.serve.scheduler import Scheduler, Shapes, Step
from autopar.serve.sequence import Job, Sequence
from autopar.serve.stream import Stream

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """How an engine serves.

    Attributes:
        eos: end-of-text tokens. salt: names the model and its weights; prefixes are shared only within it.
        prefill_tokens: most padded tokens (rows × new) of a prefill step; None: the runner's longest chunk or
            most rows, whichever is more. Decode steps wait for prefill steps, so it bounds their delay.
        prefix_cache: whether blocks of prompts are kept for later prompts.
        queue_requests, queue_tokens: requests that may wait to be admitted, and the tokens (prompts and
            longest answers) that these may have together; None: no limit. One request may always wait.
        weights: share of a key relative to the others', 1 if not named.
        most_answers: answers or beams that one request may ask for.
    """

    eos: tuple[int, ...] = ()
    salt: str = ""
    prefill_tokens: int | None = None
    prefix_cache: bool = True
    queue_requests: int = 1024
    queue_tokens: int | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    most_answers: int = 128


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
        options: Options = Options(),
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
        self._jobs: dict[str, Job] = {}
        self._arrivals = 0
        self._meter = Meter()
        self._state, self._error, self._failed_at = "ready", None, 0.0
        self._delivery = Delivery(self._meter)
        self._flight: deque[tuple[Step, Logits, float]] = deque()
        self._preemptions = 0
        self._queries = self._hits = 0
        self._use(runner)
        self._thread = threading.Thread(target=self._loop, name="autopar-engine", daemon=True)
        self._thread.start()

    def _use(self, runner: Runner) -> None:
        """Takes a runner with all its blocks empty."""
        options = self._options
        shapes = Shapes.of(runner, options.prefill_tokens)
        self._runner = runner
        self._blocks = BlockManager(runner.blocks, runner.block_size, options.prefix_cache)
        self._scheduler = Scheduler(shapes, self._blocks, options.weights)
        self._results = Results(self._scheduler, self._blocks, self._tokenizer, self._delivery)
        held = min(self._blocks.total, shapes.tables[-1]) * runner.block_size
        self.longest = min(runner.max_length, held)

    # --- what clients call

    def submit(self, request: Request) -> Stream:
        """Returns the stream of a request's answers.

        Raises:
            BadParameter: a field out of range, or a prompt that leaves no room. QueueFull: too much waits.
            Unavailable: the engine drains, is closed or has failed.
        """
        job = self._job(request)
        with self._lock:
            self._refuse()
            waiting = len(self._inbox) + self._scheduler.queued
            tokens = self._inbox_tokens + self._scheduler.queued_tokens + job.tokens
            most = self._options.queue_tokens
            if waiting and (waiting >= self._options.queue_requests or (most is not None and tokens > most)):
                self._meter.rejected += 1
                raise QueueFull(f"{waiting} requests are waiting already", self._patience())
            if request.id in self._jobs:
                raise BadParameter("id", f"{request.id!r} is of a request under way; give each its own")
            self._arrivals += 1
            job.order = self._arrivals
            self._jobs[request.id] = job
            self._inbox.append(job)
            self._inbox_tokens += job.tokens
            self._meter.requests += 1
            self._lock.notify_all()
        return job.stream

    def cancel(self, id: str) -> None:
        """Ends a request; nothing happens if it is unknown or has ended."""
        with self._lock:
            if id in self._jobs:
                self._cancelled.append(id)
                self._lock.notify_all()

    def metrics(self) -> Snapshot:
        """Returns what the engine has counted so far and how it stands."""
        meter, scheduler, blocks = self._meter, self._scheduler, self._blocks
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
            preemptions=self._preemptions + scheduler.preemptions,
            restarts=meter.restarts,
            steps=meter.steps,
            prompt_tokens=meter.prompt_tokens,
            answer_tokens=meter.answer_tokens,
            prefix_queries=self._queries + blocks.queries,
            prefix_hits=self._hits + blocks.hits,
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
        self._runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- taking requests

    def _refuse(self) -> None:
        if self._state not in ("ready", "restarting"):
            reason = f": {self._error}" if self._state == "failed" else ""
            raise Unavailable(f"the engine takes no requests, it is {self._state}{reason}")

    def _patience(self) -> float:
        """Seconds after which a refused client may try again: what requests waited of late, within reason."""
        return min(60.0, max(1.0, self._meter.recent_wait))

    def _job(self, request: Request) -> Job:
        sampling, prompt = request.sampling, request.prompt
        vocabulary = self._runner.vocabulary
        sampling.check(vocabulary, self._options.most_answers)
        if not prompt:
            raise BadParameter("prompt", "must have at least one token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise BadParameter("prompt", f"must have token ids from 0 to {vocabulary - 1}")
        limit = self._limit(request)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        ends = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else frozenset(self._options.eos)
        )
        stream = Stream(request, lambda: self.cancel(request.id))
        job = Job(request, stream, 0, limit, seed, ends, sampling.plain, sampling.streams)
        size = self._runner.block_size
        blocks = -(-(len(prompt) + limit) // size)
        start = root(self._options.salt, request.salt)
        job.sequences = [Sequence(job, 0, list(prompt), blocks, start)]
        return job

    def _limit(self, request: Request) -> int:
        """New tokens that a request's answers may have."""
        sampling, size = request.sampling, len(request.prompt)
        longest = self.longest
        if sampling.num_beams > 1:  # all must fit at once
            if sampling.num_beams > self._scheduler.most_rows:
                raise BadParameter("num_beams", f"must be at most {self._scheduler.most_rows} on this server")
            longest = min(longest, self._blocks.total // sampling.num_beams * self._runner.block_size)
        room = longest - size
        wanted = sampling.max_tokens
        if room < (0 if wanted == 0 else 1):
            most = longest - (wanted != 0)
            raise BadParameter("prompt", f"must have at most {most} tokens, but has {size}")
        if wanted is not None and wanted > room:
            raise BadParameter(
                "max_tokens",
                f"must be at most {room}, as prompt ({size} tokens) and answer have {longest}, but is {wanted}",
            )
        return room if wanted is None else wanted

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
                    self._results.cancel(job)
                self._step()
            except Exception as error:  # of the runner, or our own: no stream must hang for it
                _log.exception("a step failed")
                self._recover(error)
            self._forget()
        self._fail(list(self._jobs.values()), "the engine was closed")

    def _has_work(self) -> bool:
        asked = self._inbox or self._cancelled or self._state == "closed"
        return bool(asked or self._flight or not self._scheduler.idle)

    def _take(self) -> list[Job]:
        """Hands new jobs to the scheduler and returns those to be cancelled."""
        for job in self._inbox:
            self._scheduler.add(job.sequences[0])
        self._inbox.clear()
        self._inbox_tokens = 0
        cancelled = [self._jobs[id] for id in dict.fromkeys(self._cancelled) if id in self._jobs]
        self._cancelled.clear()
        return cancelled

    def _step(self) -> None:
        """Starts as many steps as can be in flight, then takes the results of the oldest."""
        while len(self._flight) < self._runner.groups:
            step = self._scheduler.schedule()
            if step is None:
                break
            started = time.monotonic()
            if step.copies:
                self._runner.copy(step.copies)
            self._flight.append((step, self._runner.run(step.batch, step.every), started))
        self._delivery.deliver()
        self._count_admitted()
        if self._flight:
            step, logits, started = self._flight.popleft()
            self._results.commit(step, logits)
            self._meter.steps += 1
            self._meter.step_time.add(time.monotonic() - started)
            self._meter.batch.add(len(step.rows))
        else:
            assert self._scheduler.idle, "nothing runs although requests wait"
        if self._scheduler.idle:
            self._delivery.deliver()  # there is no next step to do it beside

    def _count_admitted(self) -> None:
        for job in self._scheduler.take_admitted():
            assert job.admitted is not None
            self._meter.add_wait(job.admitted - job.request.arrival)

    def _forget(self) -> None:
        """Drops the jobs that have ended."""
        ended = self._delivery.take_ended()
        if ended:
            with self._lock:
                for job in ended:
                    self._jobs.pop(job.request.id, None)
                self._lock.notify_all()

    # --- failure

    def _recover(self, error: Exception) -> None:
        """Ends what was under way with an error, starts the model again, and goes on with what waits."""
        words = f"{type(error).__name__}: {error}"
        waiting = self._scheduler.jobs_waiting()
        with self._lock:
            self._error, self._failed_at = words, time.monotonic()
            if self._state == "ready":
                self._state = "restarting"
            kept = {*waiting, *self._inbox}
            affected = [job for job in self._jobs.values() if job not in kept]
        self._flight.clear()
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
        """Goes on with a new runner, whose blocks are empty."""
        with self._lock:
            self._preemptions += self._scheduler.preemptions
            self._queries += self._blocks.queries
            self._hits += self._blocks.hits
            self._use(runner)
            for job in waiting:
                self._scheduler.add(job.sequences[0])

    def _give_up(self, error: str) -> None:
        self._renew(self._runner, [])  # it isn't run again; this drops all sequences
        with self._lock:
            if self._state != "closed":
                self._state = "failed"
            self._error = error
            self._inbox.clear()
            self._inbox_tokens = 0
            jobs = list(self._jobs.values())
        self._fail(jobs, f"the model failed: {error}")

    def _fail(self, jobs: list[Job], error: str) -> None:
        """Ends jobs with an error; their sequences stay where they are, as the scheduler is given up too."""
        self._delivery.deliver()
        for job in jobs:
            if not job.done:
                self._delivery.end(job, FinishReason.ERROR, error)
        self._delivery.wake()
        self._forget()
