"""Factors of tensor dims that can be tied together and split: how several factor rules become one.

A dim is a list of factors, major first. Composing two operations ties the dims of the tensor between them;
where one says "8" and the other "2·4", the 8 is split. Flags (fixed, reduced) are kept on the factors they
were given for and read off the pieces at the end.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from autopar.core.graph import Rule

Factors = list[int]
"""The factors of one dim, major first."""


@dataclass
class Pool:
    """Union-find over factors, where a factor may be split into (major, minor)."""

    sizes: list[int] = field(default_factory=list)
    fixed: set[int] = field(default_factory=set)
    reduced: set[int] = field(default_factory=set)
    _same: dict[int, int] = field(default_factory=dict)
    _parts: dict[int, tuple[int, int]] = field(default_factory=dict)

    def new(self, size: int) -> int:
        """Returns a fresh factor."""
        self.sizes.append(size)
        return len(self.sizes) - 1

    def leaves(self, factors: Iterable[int]) -> Factors:
        """Returns the unsplit factors that `factors` stand for now, without those of size 1."""
        found: Factors = []
        for factor in factors:
            while factor in self._same:
                factor = self._same[factor]
            if factor in self._parts:
                found += self.leaves(self._parts[factor])
            elif self.sizes[factor] != 1:
                found.append(factor)
        return found

    def tie(self, some: Iterable[int], others: Iterable[int]) -> None:
        """Makes two spellings of one dim the same; what cannot be made to agree must stay whole."""
        xs, ys = self.leaves(some), self.leaves(others)
        while xs and ys:
            x, y = xs[0], ys[0]
            if x == y or self.sizes[x] == self.sizes[y]:
                if x != y:
                    self._same[x] = y
                xs, ys = self.leaves(xs[1:]), self.leaves(ys[1:])
                continue
            large, small = (x, y) if self.sizes[x] > self.sizes[y] else (y, x)
            if self.sizes[large] % self.sizes[small]:
                break
            self._split(large, self.sizes[small])
            xs, ys = self.leaves(xs), self.leaves(ys)
        self.fixed.update(xs + ys)

    def _split(self, factor: int, major: int) -> None:
        self._parts[factor] = (self.new(major), self.new(self.sizes[factor] // major))

    def rule(
        self,
        operands: Sequence[Sequence[Factors] | None],
        results: Sequence[Sequence[Factors]],
        notes: Iterable[str] = (),
    ) -> Rule:
        """Returns the rule of an operation with these operands and results, its factors renumbered from 0.

        Also fixed is a factor that occurs twice in one tensor (a diagonal), that is summed and yet occurs in
        a result (its all-reduce happens inside), or that occurs in operands only without being summed.
        """
        ins = [None if t is None else [self.leaves(d) for d in t] for t in operands]
        outs = [[self.leaves(d) for d in t] for t in results]
        tensors = [t for t in [*outs, *ins] if t is not None]
        used = list(dict.fromkeys(f for t in tensors for d in t for f in d))
        made = {f for t in outs for d in t for f in d}
        twice = {f for t in tensors for f, n in Counter(f for d in t for f in d).items() if n > 1}
        summed = set(self.leaves(self.reduced))
        lost = {f for f in used if f not in made and f not in summed}
        fixed = set(self.leaves(self.fixed)) | twice | (summed & made) | lost
        number = {f: i for i, f in enumerate(used)}

        def renumber(tensor: list[Factors]) -> tuple[tuple[int, ...], ...]:
            return tuple(tuple(number[f] for f in dim) for dim in tensor)

        return Rule(
            operands=tuple(None if t is None else renumber(t) for t in ins),
            results=tuple(renumber(t) for t in outs),
            sizes=tuple(self.sizes[f] for f in used),
            reductions=tuple(number[f] for f in used if f in summed and f not in fixed),
            fixed=tuple(number[f] for f in used if f in fixed),
            notes=tuple(dict.fromkeys(notes)),
        )


def covers(pool: Pool, factors: Sequence[int], size: int) -> bool:
    """Returns whether `factors` make up a whole dim of `size` elements."""
    return math.prod(pool.sizes[f] for f in factors) == size
