"""A sequence that is being answered, and the job (the request with all its answers) that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from autopar.serve.answer import Answer
from autopar.serve.beam import BeamSearch
from autopar.serve.blocks import Digest, chain
from autopar.serve.request import Request, TokenLogprob
from autopar.serve.sampling import Sampler
from autopar.serve.stream import Stream


@dataclass(eq=False)
class Job:
    """A request under way.

    Attributes:
        order: number by arrival; later ones are preempted first.
        limit: new tokens at most per answer, `Sampling.max_tokens` and the longest sequence considered.
        seed: what its random numbers come from, drawn if the request gives none.
        ends: tokens that end an answer.
        plain: whether all its tokens are the likeliest ones and nothing else is reported.
        streams: whether pieces go out as they are made.
        sequences: those alive; one until the prompt is computed, then one per answer or beam.
        answers: what is read of each, from the first token on.
        open: answers that have not ended. done: whether the stream has ended.
        beams: the search, if it is one.
        scores: log probabilities of the prompt's tokens from the second on, as far as computed, if asked for.
        scored: whether they went out.
        cached: tokens of the prompt that the prefix cache held when it was first admitted, or None before.
        admitted, first: seconds (monotonic clock) of its start and of its first token, None before.
    """

    request: Request
    stream: Stream
    order: int
    limit: int
    seed: int
    ends: frozenset[int] = frozenset()
    plain: bool = False
    streams: bool = True
    sequences: list[Sequence] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)
    open: int = 1
    done: bool = False
    beams: BeamSearch | None = None
    scores: list[TokenLogprob] = field(default_factory=list)
    scored: bool = False
    cached: int | None = None
    admitted: float | None = None
    first: float | None = None

    @property
    def tokens(self) -> int:
        """Returns how many tokens the prompt and the longest answers have."""
        return len(self.request.prompt) + self.limit * self.request.sampling.width

    @property
    def lockstep(self) -> bool:
        """Returns whether the sequences must take each step together: beams that compete."""
        return self.beams is not None


class Sequence:
    """Tokens with the KV blocks that hold the state of the first `computed` of them.

    Attributes:
        job: the request it belongs to. index: which of its answers (or beams).
        tokens: prompt and answer so far. prompt: how many of them are the prompt's.
        computed: tokens whose keys and values are in the blocks once all steps that were started are done.
        table: int32, the blocks in order; the first `held` count.
        epoch: changes when the sequence loses its blocks: results of steps started before are stale.
        pending: whether a step is under way that will give its next token.
        running: whether it has been admitted and holds blocks.
        turn: number of the step it last was part of.
    """

    __slots__ = (
        "computed",
        "digests",
        "epoch",
        "held",
        "index",
        "job",
        "pending",
        "prompt",
        "running",
        "sampler",
        "table",
        "tokens",
        "turn",
    )

    def __init__(self, job: Job, index: int, tokens: list[int], blocks: int, root: Digest):
        """Args: blocks: the most it can need. root: what the hashes of its blocks start from."""
        self.job = job
        self.index = index
        self.tokens = tokens
        self.prompt = len(tokens)
        self.computed = 0
        self.table = np.zeros(blocks, np.int32)
        self.held = 0
        self.digests: list[Digest] = [root]  # of the first 0, 1, 2 … full blocks
        self.epoch = 0
        self.pending = False
        self.running = False
        self.turn = 0
        self.sampler: Sampler | None = None

    @property
    def remaining(self) -> int:
        """Returns how many tokens are not computed; 1 when decoding."""
        return len(self.tokens) - self.computed

    @property
    def blocks(self) -> list[int]:
        """Returns the blocks it holds, in order."""
        return self.table[: self.held].tolist()

    def append_blocks(self, blocks: list[int]) -> None:
        """Adds blocks to the end of the table."""
        self.table[self.held : self.held + len(blocks)] = blocks
        self.held += len(blocks)

    def digest(self, count: int, block_size: int) -> list[Digest]:
        """Returns the hashes of the first `count` full blocks."""
        while len(self.digests) <= count:
            at = (len(self.digests) - 1) * block_size
            self.digests.append(chain(self.digests[-1], self.tokens[at : at + block_size]))
        return self.digests[1 : count + 1]

    def fork(self, index: int) -> Sequence:
        """Returns a sequence with the same tokens and table; the caller counts it as a holder of blocks."""
        twin = Sequence(self.job, index, list(self.tokens), len(self.table), self.digests[0])
        twin.prompt, twin.computed, twin.held = self.prompt, self.computed, self.held
        twin.table[: self.held] = self.table[: self.held]
        twin.digests = list(self.digests)
        twin.running, twin.turn = self.running, self.turn
        return twin
