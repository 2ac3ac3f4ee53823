"""What runs next: who is admitted, which rows make up a step, who gives way when blocks run out."""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Iterable, Mapping
from dataclasses import replace

from autopar.serve.batch import Logits
from autopar.serve.blocks import BlockManager
from autopar.serve.fair import ANSWER_COST, PROMPT_COST, FairQueue
from autopar.serve.sequence import Job, Sequence
from autopar.serve.steps import Row, Shapes, Step, batch_of, bucket

IN_A_ROW = 4
"""Prefill steps that may follow each other while decode steps wait for company."""


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.job.order, sequence.index


class Scheduler:
    """Makes steps of sequences.

    Waiting sequences are admitted while rows and blocks for their whole prompts are there, preempted ones
    before new ones, new ones by fair shares. Steps of several new tokens per row (prefill, in chunks) and
    steps of one (decode) take turns, save where many short prompts come together. With several groups each
    step takes its share of the rows, the longest unserved first, so that as many steps as there are groups
    can be in flight. A sequence that needs a block when none is left takes those of the latest arrival, which
    goes back to waiting and is computed anew (mostly from the prefix cache).

    Attributes:
        running: admitted sequences by arrival. preemptions: how many times one had to give way.
        queued_tokens: tokens of the requests that have not been admitted, prompts and longest answers.
    """

    def __init__(self, shapes: Shapes, blocks: BlockManager, weights: Mapping[str, float] | None = None):
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.queued_tokens = 0
        self._shapes = shapes
        self._blocks = blocks
        self._queue: FairQueue[Sequence] = FairQueue(weights)
        self._again: list[Sequence] = []  # preempted, by arrival; of beams only the first
        self._admitted: list[Job] = []
        self._turn = 0
        self._prefilled = 0  # prefill steps since the last decode step

    @property
    def most_rows(self) -> int:
        """Returns how many rows a step may have."""
        return self._shapes.rows[-1]

    @property
    def queued(self) -> int:
        """Returns how many requests have not been admitted yet."""
        return len(self._queue)

    @property
    def waiting(self) -> int:
        """Returns how many sequences wait, preempted ones among them."""
        return len(self._queue) + len(self._again)

    @property
    def idle(self) -> bool:
        """Returns whether there is nothing to do."""
        return not self.running and not self.waiting

    def add(self, sequence: Sequence) -> None:
        """Adds a new sequence to those waiting."""
        self._queue.push(sequence.job.request.key, sequence.job.order, sequence)
        self.queued_tokens += sequence.job.tokens

    def adopt(self, sequence: Sequence) -> None:
        """Adds a fork, which holds blocks already, to those running."""
        insort(self.running, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Lets go of a sequence wherever it is; its blocks are dropped."""
        if sequence.running:
            self._release(sequence)
            return
        if sequence in self._again:
            self._again.remove(sequence)
        elif self._queue.remove(sequence.job.request.key, sequence):
            self.queued_tokens -= sequence.job.tokens
        sequence.epoch += 1

    def take_admitted(self) -> list[Job]:
        """Returns the jobs that were admitted since the last call."""
        admitted, self._admitted = self._admitted, []
        return admitted

    def jobs_waiting(self) -> list[Job]:
        """Returns the jobs that have not been admitted yet, by arrival."""
        return [sequence.job for sequence in self._queue.items()]

    def schedule(self) -> Step | None:
        """Returns the next step, its sequences advanced as if it were done; None if nothing can run now."""
        self._admit()
        kinds = (self._decode, self._prefill) if self._decode_first() else (self._prefill, self._decode)
        for kind in kinds:
            step = kind()
            if step is not None:
                self._prefilled = self._prefilled + 1 if step.reads else 0
                return step
        return None

    def _decode_first(self) -> bool:
        """Whether it is the decode steps' turn.

        After a prefill step it is, unless at least a quarter of the rows have only one chunk left to be read:
        a decode step takes hardly longer for all of them than for those that are ready.
        """
        longest = self._shapes.new[-1]
        ready = sum(1 for s in self.running if s.remaining == 1)
        soon = sum(1 for s in self.running if 1 < s.remaining <= longest)
        return self._prefilled >= (IN_A_ROW if 3 * soon >= ready else 1)

    def follow(self, step: Step, logits: Logits) -> Step | None:
        """Returns the step that goes on with the rows of a decode step that is under way.

        So the model has its next work before the results of the last have been looked at. A row that ends
        with those takes part for nothing: what comes of it is stale then.

        Args:
            logits: of the step, to be waited for.

        Returns:
            None where more must be known first: somebody waits, a row is to be sampled, will reach its limit,
            needs another's block or fills one, which is then named by its tokens.
        """
        rows = [row.sequence for row in step.rows]
        if self.waiting or len(rows) != len(self.running) or not all(map(self._goes_on, step.rows)):
            return None
        if sum(s.computed == s.held * self._blocks.block_size for s in rows) > self._blocks.available:
            return None
        for sequence in rows:
            self._make_room(sequence, {})
        return self._make([(sequence, 1) for sequence in rows], [], 1, logits)

    def _goes_on(self, row: Row) -> bool:
        """Whether all that a row's next step needs is its next token."""
        sequence, job, size = row.sequence, row.sequence.job, self._blocks.block_size
        if not (row.fresh and row.samples and row.length == 1 and sequence.remaining == 0):
            return False
        if not (job.plain and job.answers):  # answers part when they get their first token
            return False
        at, offset = divmod(sequence.computed, size)
        own = at == sequence.held or self._blocks.references(int(sequence.table[at])) == 1
        return own and offset + 1 < size and len(sequence.tokens) + 1 - sequence.prompt < job.limit

    # --- admission and release

    def _admit(self) -> None:
        if not self.waiting:
            return
        limit = self._shapes.rows[-1] * self._shapes.groups
        rows = sum(self._width(sequence) for sequence in self.running)
        while True:
            head = self._again[0] if self._again else self._queue.peek()
            if head is None:
                return
            unit = head.job.sequences if head.job.lockstep else [head]
            width = sum(self._width(sequence) for sequence in unit)
            if rows and rows + width > limit:
                return
            if not self._fits(unit) or self._comes_soon(head):
                return
            if self._again:
                self._again.pop(0)
            else:
                self.queued_tokens -= self._queue.pop().job.tokens
            rows += width
            for sequence in unit:
                self._start(sequence)

    @staticmethod
    def _width(sequence: Sequence) -> int:
        """Rows that a sequence takes, or will once its answers part."""
        return sequence.job.request.sampling.width if not sequence.job.answers else 1

    def _prefix(self, sequence: Sequence) -> list[int]:
        """The kept blocks that a sequence can start from; its last token is always computed."""
        if sequence.job.request.sampling.prompt_logprobs is not None and not sequence.job.answers:
            return []  # the logits of the whole prompt are wanted
        size = self._blocks.block_size
        return self._blocks.find(sequence.digest((len(sequence.tokens) - 1) // size, size))

    def _comes_soon(self, sequence: Sequence) -> bool:
        """Whether most of what a sequence needs is being computed for another, to be shared soon."""
        if not self._blocks.shares:
            return False
        size = self._blocks.block_size
        found = len(self._prefix(sequence))
        wanted = sequence.digests[found + 1 :]
        for other in self.running:
            if other.remaining <= 1 or other.computed > found * size:
                continue
            coming = other.digests[found + 1 :]
            same = sum(1 for ours, theirs in zip(wanted, coming) if ours == theirs)
            if 2 * same * size >= len(sequence.tokens) - found * size:
                return True
        return False

    def _fits(self, unit: Iterable[Sequence]) -> bool:
        """Whether there are blocks for all tokens so far, and one more for each that runs."""
        needed = 0
        for sequence in unit:
            found = self._prefix(sequence)
            needed += self._count(len(sequence.tokens)) - len(found) + self._blocks.kept_among(found)
        spare = len(self.running)
        return needed + spare <= self._blocks.available

    def _count(self, tokens: int) -> int:
        return -(-tokens // self._blocks.block_size)

    def _start(self, sequence: Sequence) -> None:
        found = self._prefix(sequence)
        self._blocks.share(found)
        sequence.append_blocks(found)
        sequence.computed = len(found) * self._blocks.block_size
        for _ in range(self._count(len(sequence.tokens)) - len(found)):
            sequence.append_blocks([self._blocks.take()])
        if sequence.job.cached is None:
            sequence.job.cached = sequence.computed
            sequence.job.admitted = time.monotonic()
            self._admitted.append(sequence.job)
            self._blocks.queries += len(sequence.tokens)
            self._blocks.hits += sequence.computed
        sequence.running = True
        insort(self.running, sequence, key=_order)

    def _release(self, sequence: Sequence) -> None:
        self._blocks.drop(sequence.blocks)
        sequence.held = sequence.computed = 0
        sequence.epoch += 1
        sequence.pending = sequence.running = False
        self.running.remove(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        """Sends a sequence, with the beams beside it, back to waiting."""
        unit = sequence.job.sequences if sequence.job.lockstep else [sequence]
        for each in unit:
            self._release(each)
        insort(self._again, unit[0], key=_order)
        self.preemptions += 1

    # --- steps

    def _prefill(self) -> Step | None:
        chosen: list[tuple[Sequence, int]] = []
        new = 0
        for sequence in self.running:
            size = self._chunk(sequence)
            if size == 0:
                continue
            wanted = max(new, self._fitting_chunk(size))
            fitting = min(wanted, self._longest_chunk(len(chosen) + 1))
            if fitting < max(new, 1) or (chosen and 2 * fitting < wanted):
                break  # one row more would shorten the others' chunks, or have too short a one itself
            new = fitting
            chosen.append((sequence, size))
            if len(chosen) == self._shapes.rows[-1]:
                break
        if not chosen:
            return None
        return self._make([(sequence, min(size, new)) for sequence, size in chosen], [], new)

    def _fitting_chunk(self, size: int) -> int:
        """The bucket for so many tokens: in one piece, unless more than half of it would be padding."""
        sizes = self._shapes.new
        up = bucket(sizes, min(size, sizes[-1]))
        lower = [each for each in sizes if each <= size]
        return lower[-1] if lower and up > 2 * size else up

    def _longest_chunk(self, rows: int) -> int:
        """New tokens per row that so many rows may have; 0 if the budget allows none."""
        padded = bucket(self._shapes.rows, rows)
        fitting = [new for new in self._shapes.new if new * padded <= self._shapes.budget]
        return fitting[-1] if fitting else self._shapes.new[0] if rows == 1 else 0

    @staticmethod
    def _chunk(sequence: Sequence) -> int:
        """Tokens of a sequence that a prefill step could compute; the last of beams waits for the others."""
        if sequence.pending or sequence.remaining == 1:
            return 0
        return sequence.remaining - 1 if sequence.job.lockstep else sequence.remaining

    def _decode(self) -> Step | None:
        chosen: list[Sequence] = []
        copies: dict[Sequence, tuple[int, int]] = {}
        for sequence in self._pick():
            if not sequence.running:  # preempted by one before it
                continue
            chosen.append(sequence)
            self._make_room(sequence, copies)
        chosen = [sequence for sequence in chosen if sequence.running]
        if not chosen:
            return None
        return self._make([(s, 1) for s in chosen], [copies[s] for s in chosen if s in copies], 1)

    def _pick(self) -> list[Sequence]:
        """The sequences of the next decode step, by arrival."""
        ready = [s for s in self.running if not s.pending and s.remaining == 1]
        if any(s.job.lockstep for s in ready):
            able = set(ready)
            ready = [s for s in ready if not s.job.lockstep or able.issuperset(s.job.sequences)]
        share = min(-(-len(self.running) // self._shapes.groups), self._shapes.rows[-1])
        if len(ready) <= share:
            return ready
        ready.sort(key=lambda s: (s.turn, _order(s)))
        chosen: dict[Sequence, None] = {}
        for sequence in ready:
            unit = sequence.job.sequences if sequence.job.lockstep else [sequence]
            if sequence not in chosen and (not chosen or len(chosen) + len(unit) <= share):
                chosen.update(dict.fromkeys(unit))
        return sorted(chosen, key=_order)

    def _make_room(self, sequence: Sequence, copies: dict[Sequence, tuple[int, int]]) -> None:
        """Gives a sequence a block of its own for its next token, at the cost of later ones if need be."""
        at = sequence.computed // self._blocks.block_size
        while True:
            shared = at < sequence.held and self._blocks.references(int(sequence.table[at])) > 1
            if at < sequence.held and not shared:
                return
            if self._blocks.available:
                break
            self._preempt(self.running[-1])
            if not sequence.running:
                return
        own = self._blocks.take()
        if shared:
            old = int(sequence.table[at])
            copies[sequence] = (old, own)
            self._blocks.drop([old])
            sequence.table[at] = own
        else:
            sequence.append_blocks([own])

    def _make(
        self,
        chosen: list[tuple[Sequence, int]],
        copies: list[tuple[int, int]],
        new: int,
        after: Logits | None = None,
    ) -> Step:
        self._turn += 1
        batch = batch_of(chosen, new, self._shapes, self._blocks.block_size, after)
        rows = tuple([self._advance(sequence, length) for sequence, length in chosen])
        every = new > 1 and any(self._wants_every(row) for row in rows)
        sampled = tuple([at for at, row in enumerate(rows) if row.samples and not row.sequence.job.plain])
        return Step(rows, replace(batch, sampled=sampled), tuple(copies), every)

    def _advance(self, sequence: Sequence, length: int) -> Row:
        start = sequence.computed
        sequence.computed += length
        sequence.turn = self._turn
        samples = sequence.remaining <= 0  # below, where the step before has still to say its token
        sequence.pending = samples
        self._publish(sequence, start)
        self._queue.charge(sequence.job.request.key, PROMPT_COST * length if length > 1 else ANSWER_COST)
        return Row(sequence, sequence.epoch, start, length, samples)

    def _publish(self, sequence: Sequence, start: int) -> None:
        """Makes blocks that became full findable: steps take effect in order, so later ones can read them."""
        size = self._blocks.block_size
        first, last = start // size, sequence.computed // size
        if first < last:
            digests = sequence.digest(last, size)
            for at in range(first, last):
                self._blocks.publish(int(sequence.table[at]), digests[at])

    @staticmethod
    def _wants_every(row: Row) -> bool:
        job = row.sequence.job
        wanted = job.request.sampling.prompt_logprobs is not None and not job.answers
        return wanted and row.start < row.sequence.prompt - 1
