"""What comes of a step: tokens are chosen, answers part and end."""

from __future__ import annotations

import numpy as np

from autopar.serve.answer import Answer
from autopar.serve.batch import Logits
from autopar.serve.beam import BeamSearch
from autopar.serve.blocks import BlockManager
from autopar.serve.delivery import Delivery, Event
from autopar.serve.detokenize import Tokenizer
from autopar.serve.request import FinishReason, TokenLogprob
from autopar.serve.sampling import Sampler, log_softmax, logprob
from autopar.serve.scheduler import Scheduler
from autopar.serve.sequence import Job, Sequence
from autopar.serve.steps import Row, Step

_NAN = "the model's logits are not numbers; are its weights intact and its dtype wide enough?"


class Results:
    """Turns steps' logits into tokens, and the tokens into what the next step depends on."""

    def __init__(
        self, scheduler: Scheduler, blocks: BlockManager, tokenizer: Tokenizer | None, delivery: Delivery
    ):
        self._scheduler = scheduler
        self._blocks = blocks
        self._tokenizer = tokenizer
        self._delivery = delivery

    def commit(self, step: Step, logits: Logits) -> None:
        """Waits for a step's results and appends the tokens that come of it."""
        if step.every:
            self._score(step, logits.every())
        rows = [(at, row) for at, row in enumerate(step.rows) if row.samples and row.fresh]
        plain = [(at, row) for at, row in rows if row.sequence.job.plain]
        if plain or not rows:
            tokens = logits.greedy().tolist()  # waited for in any case, so that steps don't pile up
            for at, row in plain:
                self._choose(row.sequence, None, tokens[at])
        if len(plain) == len(rows):
            return
        values = logits.last()
        for at, row in rows:
            job = row.sequence.job
            if row.fresh and not job.plain and not job.lockstep:
                self._choose(row.sequence, values[at], None)
        self._search(rows, values)

    def _score(self, step: Step, values: np.ndarray) -> None:
        """Log probabilities of prompts' tokens; a prompt that is computed anew is scored anew."""
        for at, row in enumerate(step.rows):
            sequence, job = row.sequence, row.sequence.job
            top = job.request.sampling.prompt_logprobs
            if top is None or job.answers or not row.fresh:
                continue
            del job.scores[row.start :]
            for offset in range(min(row.length, sequence.prompt - 1 - row.start)):
                token = sequence.tokens[row.start + offset + 1]
                job.scores.append(logprob(values[at, offset], token, top))

    def _choose(self, sequence: Sequence, logits: np.ndarray | None, token: int | None) -> None:
        """The next token of a sequence: `token`, or by its sampler; its first makes the answers part."""
        job, sampling = sequence.job, sequence.job.request.sampling
        sequence.pending = False
        if not job.answers:
            self._open(sequence)
            if job.limit == 0:
                self._end(job, FinishReason.LENGTH)
                return
            if sampling.num_beams > 1:
                assert logits is not None
                self._begin_search(job, logits)
                return
            sequences = list(job.sequences)
        else:
            sequences = [sequence]
        for each in sequences:
            chosen = token
            if chosen is None:
                assert logits is not None and each.sampler is not None
                chosen = each.sampler.choose(logits, len(each.tokens))
            if chosen < 0:
                self.fail(job, _NAN)
                return
            top = sampling.logprobs if sampling.streams or sampling.logprobs is not None else 0
            reported = None if logits is None or top is None else logprob(logits, chosen, top)
            self._append(each, chosen, reported)

    def _open(self, sequence: Sequence) -> None:
        """Makes the answers of a job, each with a sequence and a sampler (beams part by themselves)."""
        job, sampling = sequence.job, sequence.job.request.sampling
        count = sampling.n if sampling.num_beams > 1 else sampling.width
        job.answers = [Answer(at, sampling, self._tokenizer, job.request.prompt) for at in range(count)]
        job.open = count
        self._delivery.meter.prompt_tokens += len(job.request.prompt)
        if job.limit == 0 or sampling.num_beams > 1:
            return
        for at in range(1, count):
            twin = sequence.fork(at)
            self._blocks.share(twin.blocks)
            job.sequences.append(twin)
            self._scheduler.adopt(twin)
        if not job.plain:
            for each in job.sequences:
                each.sampler = Sampler(sampling, job.seed, each.index, job.request.prompt)

    def _append(self, sequence: Sequence, token: int, reported: TokenLogprob | None) -> None:
        job = sequence.job
        answer = job.answers[sequence.index]
        sequence.tokens.append(token)
        if sequence.sampler is not None:
            sequence.sampler.add(token)
        text = finish = stop = None
        if token in job.ends:
            finish = FinishReason.STOP
            stop = token if token in job.request.sampling.stop_token_ids else None
        elif answer.stops:
            text, stop = answer.read((token,))
            finish = None if stop is None else FinishReason.STOP
        if finish is None and len(sequence.tokens) - sequence.prompt >= job.limit:
            finish = FinishReason.LENGTH
        self._delivery.add(Event(job, answer, token, reported, text, finish, stop))
        if finish is not None:
            self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        sequence.job.sequences.remove(sequence)

    # --- beams

    def _begin_search(self, job: Job, logits: np.ndarray) -> None:
        sampling = job.request.sampling
        job.beams = BeamSearch(
            sampling.num_beams, job.ends, job.limit, sampling.length_penalty, sampling.early_stopping
        )
        self._advance_search(job, logits[None])

    def _search(self, rows: list[tuple[int, Row]], values: np.ndarray) -> None:
        """Advances the searches of a step; a search's beams are always together in a step."""
        searches: dict[Job, dict[Sequence, int]] = {}
        for at, row in rows:
            if row.sequence.job.lockstep and row.fresh:
                searches.setdefault(row.sequence.job, {})[row.sequence] = at
        for job, places in searches.items():
            self._advance_search(job, values[[places[beam] for beam in job.sequences]])

    def _advance_search(self, job: Job, logits: np.ndarray) -> None:
        assert job.beams is not None
        beams = job.sequences
        logprobs = log_softmax(np.asarray(logits, np.float32))
        if np.isnan(logprobs).any():
            self.fail(job, _NAN)
            return
        for at, beam in enumerate(beams):
            beam.pending = False
            logprobs[at] = Sampler(job.request.sampling, 0, 0, beam.tokens).adjust(logprobs[at])
        going = job.beams.advance(logprobs)
        if not going:
            self._finish_search(job)
            return
        job.sequences = [beams[parent].fork(at) for at, (parent, _) in enumerate(going)]
        for beam, (_, token) in zip(job.sequences, going):
            self._blocks.share(beam.blocks)
            beam.tokens.append(token)
            self._scheduler.adopt(beam)
        for beam in beams:
            self._scheduler.remove(beam)

    def _finish_search(self, job: Job) -> None:
        assert job.beams is not None
        for beam in list(job.sequences):
            self._drop(beam)
        for answer, found in zip(job.answers, job.beams.found):
            text = answer.read(found.tokens[:-1] if found.ended else found.tokens)[0] + answer.rest()
            answer.add(found.tokens, text, None)
            answer.cumulative = found.logprob
            last = found.tokens[-1]
            stop = last if found.ended and last in job.request.sampling.stop_token_ids else None
            answer.ended = (FinishReason.STOP if found.ended else FinishReason.LENGTH, stop)
        self._delivery.finish(job)

    # --- endings that are not the model's

    def cancel(self, job: Job) -> None:
        """Ends a job for its client."""
        self._delivery.deliver()
        self._end(job, FinishReason.CANCELLED)

    def fail(self, job: Job, error: str) -> None:
        """Ends a job because of the model."""
        self._delivery.deliver()
        self._end(job, FinishReason.ERROR, error)

    def _end(self, job: Job, finish: FinishReason, error: str | None = None) -> None:
        """Ends a job; answers that had ended by themselves are left as they are."""
        for sequence in list(job.sequences):
            self._drop(sequence)
        if not job.done:
            self._delivery.end(job, finish, error)
