"""What the client sees: tokens become text and pieces while the model is busy with the next step."""

from __future__ import annotations

import time
from typing import NamedTuple

from autopar.serve.answer import Answer
from autopar.serve.metrics import Meter
from autopar.serve.request import FinishReason, TokenLogprob
from autopar.serve.sequence import Job
from autopar.serve.stream import Stream, wake


class Event(NamedTuple):
    """A token of an answer on its way to the client.

    Attributes:
        text: what it adds if that has been read already, else None.
        finish, stop: how the answer ended, if it did.
    """

    job: Job
    answer: Answer
    token: int
    logprob: TokenLogprob | None
    text: str | None
    finish: FinishReason | None
    stop: str | int | None


class Delivery:
    """Holds tokens until `deliver`, which is called when the next step is on its way.

    So the model never waits for detokenising, save that of answers with stop strings.

    Attributes:
        meter: counts what goes out.
    """

    def __init__(self, meter: Meter):
        self.meter = meter
        self._events: list[Event] = []
        self._touched: dict[Stream, None] = {}
        self._ended: list[Job] = []

    def take_ended(self) -> list[Job]:
        """Returns the jobs that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def add(self, event: Event) -> None:
        """Adds a token that is to go out."""
        self._events.append(event)

    def deliver(self) -> None:
        """Sends out all that was added, and wakes the readers."""
        events, self._events = self._events, []
        now = time.monotonic()
        for event in events:
            if not event.job.done:
                self._deliver(event, now)
        self.meter.answer_tokens += len(events)
        self.wake()

    def wake(self) -> None:
        """Makes the readers of what was put look."""
        if self._touched:
            wake(self._touched)
            self._touched.clear()

    def finish(self, job: Job) -> None:
        """Sends out the answers of a job that go out together, all ended, and ends its stream."""
        sampling = job.request.sampling
        answers = job.answers
        if sampling.num_beams == 1:
            answers = sorted(answers, key=lambda each: -(each.cumulative or 0.0) / max(1, each.tokens))
        for index, answer in enumerate(answers[: sampling.n]):
            answer.index = index
            self._put(job, answer)
        self._close(job)

    def end(self, job: Job, finish: FinishReason, error: str | None = None) -> None:
        """Ends all answers of a job that have not ended, and its stream."""
        sampling = job.request.sampling
        answers = job.answers or [Answer(at, sampling, None, ()) for at in range(sampling.n)]
        for answer in answers[: sampling.n]:
            if answer.ended is None or not sampling.streams:
                answer.ended = (finish, None)
                self._put(job, answer, error)
        self._close(job)

    def _deliver(self, event: Event, now: float) -> None:
        job, answer, text = event.job, event.answer, event.text
        if text is None:
            text = "" if event.token in job.ends else answer.read((event.token,))[0]
        if event.finish is not None:
            answer.ended = (event.finish, event.stop)
            if not isinstance(event.stop, str):
                text += answer.rest()
        answer.add((event.token,), text, None if event.logprob is None else (event.logprob,))
        self._time(job, answer, now)
        if job.streams:
            self._put(job, answer)
        if event.finish is not None:
            job.open -= 1
            if job.open == 0 and job.streams:
                self._close(job)
            elif job.open == 0:
                self.finish(job)

    def _time(self, job: Job, answer: Answer, now: float) -> None:
        if job.first is None:
            job.first = now
            self.meter.first_token.add(now - job.request.arrival)
        elif answer.last is not None:
            self.meter.inter_token.add(now - answer.last)
        answer.last = now

    def _put(self, job: Job, answer: Answer, error: str | None = None) -> None:
        sampling = job.request.sampling
        scores = None
        if sampling.prompt_logprobs is not None and not job.scored and error is None:
            scores = (None, *job.scores)
            job.scored = True
        report = sampling.logprobs is not None
        job.stream.put(answer.piece(report, len(job.request.prompt), job.cached or 0, error, scores))
        self._touched[job.stream] = None

    def _close(self, job: Job) -> None:
        ended = job.answers[0].ended if job.answers else None
        reason = ended[0].value if ended else "cancelled"
        self.meter.finished[reason] = self.meter.finished.get(reason, 0) + 1
        self.meter.latency.add(time.monotonic() - job.request.arrival)
        job.done = True
        self._ended.append(job)
        job.stream.end()
        self._touched[job.stream] = None
