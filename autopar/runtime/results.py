"""The results of one step, gathered from the stages that hold them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import jax.numpy as jnp

from autopar.core.program import Buffer, Program
from autopar.runtime.array import DistributedArray, Generation, Home
from autopar.runtime.backend import Session
from autopar.runtime.layout import as_dtype

Array = Any
Waits = list[Callable[[], Sequence[Array]]]
"""Per stage, a function that gives what was asked of it."""


class Results:
    """Makes the result leaves of a call.

    A leaf is the live `jax.Array` where this process holds it whole; a `DistributedArray` where another
    process does or where it lies in pieces. State is fetched when it is looked at; other results are asked
    for at once.

    Args:
        leaves: `trace.traced.Leaf` of the results.
        outputs: value ids of the step's outputs, as in the plan.
        program, session: who holds what.
    """

    def __init__(
        self, leaves: Sequence[Any], outputs: Sequence[int | None], program: Program, session: Session
    ):
        self._session, self._leaves = session, tuple(leaves)
        self._homes = homes(self._leaves, outputs, program)
        held = [set(worker.state) for worker in program]
        self._state = [all(b in held[s] for s, b in home.pieces) for home in self._homes]
        now = [home for home, state in zip(self._homes, self._state) if session.local or not state]
        asked = [
            tuple(dict.fromkeys(b for home in now for s, b in home.pieces if s == stage))
            for stage in range(len(held))
        ]
        self._fetch = [session.fetcher(stage, buffers) for stage, buffers in enumerate(asked)]
        self._place = {(s, b): k for s, buffers in enumerate(asked) for k, b in enumerate(buffers)}
        self._pick = self._picker([len(buffers) for buffers in asked]) if session.local else None

    def __call__(self, generation: Generation) -> Sequence[Any]:
        """Returns the leaves of the step that was just started; its state goes stale with `generation`."""
        if self._pick is not None:
            first, *others = [fetch()() for fetch in self._fetch]
            return self._pick(first if not others else [*first, *(x for more in others for x in more)])
        waits = [functools.cache(fetch()) for fetch in self._fetch]
        return [self._leaf(k, waits, generation) for k in range(len(self._leaves))]

    def _picker(self, counts: list[int]) -> Callable[[Sequence[Array]], Sequence[Array]] | None:
        """What picks the leaves from all that was fetched, where every leaf is one array; else None."""
        if len(self._homes) < 2 or any(len(home.pieces) != 1 for home in self._homes):
            return None
        start = [sum(counts[:stage]) for stage in range(len(counts))]
        return itemgetter(*(start[s] + self._place[s, b] for home in self._homes for s, b in home.pieces))

    def _leaf(self, k: int, waits: Waits, generation: Generation) -> Any:
        leaf, home = self._leaves[k], self._homes[k]
        if not home.pieces:
            return jnp.asarray(leaf.literal, as_dtype(leaf.dtype))
        if self._session.local and len(home.pieces) == 1:
            (piece,) = home.pieces
            return waits[piece[0]]()[self._place[piece]]
        pending = None if self._state[k] else [self._piece(waits, piece) for piece in home.pieces]
        stale = generation if self._state[k] else None
        dtype = as_dtype(leaf.dtype)
        return DistributedArray(leaf.path, leaf.shape, dtype, self._session, home, stale, pending)

    def _piece(self, waits: Waits, piece: tuple[int, Buffer]) -> Callable[[], Sequence[Array]]:
        wait, place = waits[piece[0]], self._place[piece]
        return lambda: [wait()[place]]


def homes(leaves: Sequence[Any], outputs: Sequence[int | None], program: Program) -> list[Home]:
    """Returns where each result leaf lies; nowhere for a literal."""
    found = {k: (s, b) for s, worker in enumerate(program) for k, b in worker.results}
    return [Home(tuple(found[k] for k in positions)) for positions in positions_of(leaves, outputs)]


def positions_of(leaves: Sequence[Any], outputs: Sequence[int | None]) -> list[list[int]]:
    """Returns which of the step's outputs each result leaf is: none for a literal, several for pieces."""
    made = iter([k for k, value in enumerate(outputs) if value is not None])
    return [[next(made) for _ in leaf.values] for leaf in leaves]
