"""Schedule, run, sample: the engine without its thread."""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from autopar.serve.batch import Logits, Runner
from autopar.serve.blocks import BlockManager, root
from autopar.serve.delivery import Delivery
from autopar.serve.detokenize import Tokenizer
from autopar.serve.metrics import Meter
from autopar.serve.request import BadParameter, Request
from autopar.serve.results import Results
from autopar.serve.scheduler import Scheduler
from autopar.serve.sequence import Job, Sequence
from autopar.serve.steps import Shapes, Step
from autopar.serve.stream import Stream


@dataclass(frozen=True)
class Options:
    """How an engine serves.

    Attributes:
        eos: end-of-text tokens. salt: names the model and its weights; prefixes are shared only within it.
        prefill_tokens: most padded tokens (rows × new) of a prefill step; None: the runner's `max_tokens`.
            Decode steps wait for prefill steps, so it bounds their delay.
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


class Core:
    """Sequences on a runner, one step at a time; not thread-safe.

    Attributes:
        runner: the model. blocks: its KV blocks. scheduler: who is where. delivery: what goes out.
        longest: tokens that prompt and answer may have together.
    """

    def __init__(self, runner: Runner, tokenizer: Tokenizer | None, options: Options, meter: Meter):
        shapes = Shapes.of(runner, options.prefill_tokens)
        self.runner = runner
        self.blocks = BlockManager(runner.blocks, runner.block_size, options.prefix_cache)
        self.scheduler = Scheduler(shapes, self.blocks, options.weights)
        self.delivery = Delivery(meter)
        self.longest = min(runner.max_length, min(self.blocks.total, shapes.tables[-1]) * runner.block_size)
        self._results = Results(self.scheduler, self.blocks, tokenizer, self.delivery)
        self._flight: deque[tuple[Step, Logits, float]] = deque()
        self._committed = 0.0  # when the last results were taken, seconds (monotonic clock)
        self._tokenizer = tokenizer
        self._options = options
        self._meter = meter

    @property
    def idle(self) -> bool:
        """Returns whether there is nothing to do."""
        return not self._flight and self.scheduler.idle

    def job(self, request: Request, stream: Stream, order: int) -> Job:
        """Returns a request as a job, not yet added; may be called from any thread.

        Raises:
            BadParameter: a field out of range, or a prompt that leaves no room.
        """
        sampling, prompt = request.sampling, request.prompt
        vocabulary = self.runner.vocabulary
        sampling.check(vocabulary, self._options.most_answers)
        if not prompt:
            raise BadParameter("prompt", "must have at least one token")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise BadParameter("prompt", f"must have token ids from 0 to {vocabulary - 1}")
        if sampling.stop and self._tokenizer is None:
            raise BadParameter("stop", "needs text, but this model has no tokenizer; use stop_token_ids")
        limit = self._limit(request)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed
        ends = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends |= frozenset(self._options.eos)
        job = Job(request, stream, order, limit, seed, ends, sampling.plain, sampling.streams)
        blocks = -(-(len(prompt) + limit) // self.runner.block_size)
        start = root(self._options.salt, request.salt)
        job.sequences = [Sequence(job, 0, list(prompt), blocks, start)]
        return job

    def _limit(self, request: Request) -> int:
        """New tokens that a request's answers may have."""
        sampling, size = request.sampling, len(request.prompt)
        longest = self.longest
        if sampling.num_beams > 1:  # all must fit at once
            most = self.scheduler.most_rows
            if sampling.num_beams > most:
                raise BadParameter("num_beams", f"must be at most {most} on this server")
            longest = min(longest, self.blocks.total // sampling.num_beams * self.runner.block_size)
        room, wanted = longest - size, sampling.max_tokens
        if room < (0 if wanted == 0 else 1):
            most = longest - (wanted != 0)
            raise BadParameter("prompt", f"must have at most {most} tokens, but has {size}")
        if wanted is not None and wanted > room:
            have = f"as prompt ({size} tokens) and answer have {longest} together"
            raise BadParameter("max_tokens", f"must be at most {room}, {have}, but is {wanted}")
        return room if wanted is None else wanted

    def add(self, job: Job) -> None:
        """Adds a job to those waiting."""
        self.scheduler.add(job.sequences[0])

    def cancel(self, job: Job) -> None:
        """Ends a job for its client."""
        self._results.cancel(job)

    def step(self) -> None:
        """Starts as many steps as can be in flight, then takes the results of the oldest.

        One more where the runner chains them: the next decode step of the same rows, so that the model does
        not wait for us between two.
        """
        while len(self._flight) < self.runner.groups:
            step = self.scheduler.schedule()
            if step is None:
                break
            self._start(step)
        if self.runner.chains and len(self._flight) == 1:
            following = self.scheduler.follow(*self._flight[0][:2])
            if following is not None:
                self._start(following)
        self.delivery.deliver()
        self._count_admitted()
        if self._flight:
            step, logits, started = self._flight.popleft()
            self._results.commit(step, logits)
            if step.reads:
                self.delivery.deliver()  # a first token does not wait for the next step to be made as well
            self._meter.steps += 1
            began, self._committed = max(started, self._committed), time.monotonic()
            self._meter.step_time.add(self._committed - began)
            self._meter.batch.add(len(step.rows))
        else:
            assert self.scheduler.idle, "nothing runs although requests wait"
        if self.idle:
            self.delivery.deliver()  # there is no next step to do it beside

    def _start(self, step: Step) -> None:
        started = time.monotonic()
        if step.copies:
            self.runner.copy(step.copies)
        self._flight.append((step, self.runner.run(step.batch, step.every), started))

    def _count_admitted(self) -> None:
        for job in self.scheduler.take_admitted():
            assert job.admitted is not None
            self._meter.add_wait(job.admitted - job.request.arrival)

    def check(self) -> None:
        """Asserts that blocks and tables account for each other (for tests)."""
        self.blocks.check(sequence.blocks for sequence in self.scheduler.running)
