"""KV blocks: who holds which, which can be shared, and which go when room is needed.

A block is free, held (by one or more tables), or kept: held by nobody, but full and known by the hash of all
tokens up to its end, so that a later prompt with the same beginning finds it. Kept blocks go, least recently
used first, when no free ones are left. (Kwon et al. 2023, "Efficient Memory Management for Large Language
Model Serving with PagedAttention".)
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from autopar.serve.batch import SCRATCH

Digest = bytes


def chain(previous: Digest, tokens: Sequence[int]) -> Digest:
    """Returns the hash of a full block, 16 bytes, from that of the blocks before it and its own tokens."""
    return hashlib.blake2b(previous + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


def root(*salts: str) -> Digest:
    """Returns the hash that chains start from: blocks are shared only between equal salts (model, tenant)."""
    return hashlib.blake2b("\0".join(salts).encode(), digest_size=16).digest()


class BlockManager:
    """The KV blocks of a runner, all but `SCRATCH`, with reference counts and the prefix cache.

    Attributes:
        total: blocks there are for sequences. block_size: tokens in each.
        shares: whether there is a prefix cache.
        queries, hits: prompt tokens looked up in the prefix cache, and those found.
    """

    def __init__(self, blocks: int, block_size: int, share: bool = True):
        """Args: blocks: the runner's, SCRATCH among them. share: whether to keep a prefix cache."""
        self.total = blocks - 1
        self.block_size = block_size
        self.queries = self.hits = 0
        self.shares = share
        self._count = blocks
        self.reset()

    def reset(self) -> None:
        """Forgets all tables and the prefix cache: what the blocks held is lost."""
        self._free = [block for block in range(self._count - 1, -1, -1) if block != SCRATCH]  # low ids first
        self._references = [0] * self._count
        self._digests: dict[int, Digest] = {}  # of full blocks that can be found
        self._known: dict[Digest, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # known and held by nobody, oldest first

    @property
    def available(self) -> int:
        """Returns how many blocks can be taken: the free ones and those that are only kept."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        """Returns how many blocks sequences hold."""
        return self.total - self.available

    @property
    def kept(self) -> int:
        """Returns how many blocks are held by nobody but kept for prompts to come."""
        return len(self._kept)

    def references(self, block: int) -> int:
        """Returns how many tables hold a block."""
        return self._references[block]

    def find(self, digests: Iterable[Digest]) -> list[int]:
        """Returns the blocks that hold the longest known beginning of a chain, without taking them."""
        found: list[int] = []
        for digest in digests:
            block = self._known.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def kept_among(self, blocks: Iterable[int]) -> int:
        """Returns how many of the blocks are held by nobody: taking them makes so many fewer available."""
        return sum(block in self._kept for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Adds a holder to each block: a fork, or a prefix that was found."""
        for block in blocks:
            self._references[block] += 1
            if self._references[block] == 1:
                del self._kept[block]

    def take(self) -> int:
        """Returns a block for one holder, a kept one if none is free; there must be one available."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._kept.popitem(last=False)
            del self._known[self._digests.pop(block)]
        assert self._references[block] == 0
        self._references[block] = 1
        return block

    def drop(self, blocks: Iterable[int]) -> None:
        """Removes a holder from each block; of those held by nobody the known ones are kept.

        The blocks come in a table's order and are let go from its end, so that prefixes outlive what follows.
        """
        for block in reversed(list(blocks)):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} dropped more often than held"
            if self._references[block] == 0:
                if block in self._digests:
                    self._kept[block] = None
                else:
                    self._free.append(block)

    def publish(self, block: int, digest: Digest) -> None:
        """Makes a full block findable, unless one with the same contents already is."""
        if self.shares and digest not in self._known and block not in self._digests:
            self._known[digest] = block
            self._digests[block] = digest

    def check(self, tables: Iterable[Iterable[int]]) -> None:
        """Asserts that the tables account for every reference and every block is in just one state."""
        counts = [0] * self._count
        for table in tables:
            for block in table:
                counts[block] += 1
        assert counts == self._references, "reference counts differ from the tables"
        free, kept = set(self._free), set(self._kept)
        taken = {block for block, count in enumerate(counts) if count}
        assert len(free) == len(self._free) and not free & kept and not (free | kept) & taken
        assert free | kept | taken == set(range(self._count)) - {SCRATCH}, "blocks have leaked"
        assert kept <= set(self._digests) and not free & set(self._digests)
        assert {self._known[digest]: digest for digest in self._known} == self._digests
