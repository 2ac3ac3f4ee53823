"""The state between calls: which arrays the workers hold already, so that passing those costs nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from operator import is_
from typing import Any

import jax
import numpy as np

from autopar.core.program import Buffer, Program
from autopar.runtime.array import DistributedArray
from autopar.runtime.backend import Session
from autopar.runtime.feeds import read
from autopar.runtime.picks import getter, putter

Array = Any
_NOTHING = object()


class State:
    """Brings the workers' state in line with the arguments of a call.

    Args:
        leaves: `trace.traced.Leaf` of the arguments that are state, in the order of the arrays given to a
            call.
        replaced: (result leaf, state leaf) pairs: the result is what the workers hold as that state
            afterwards.
        program, session: who holds what.
        sizes: value id → its shape, to cut a leaf that lives in pieces.
        donate: whether arrays that are passed in may be taken over instead of copied.
    """

    def __init__(
        self,
        leaves: Sequence[Any],
        replaced: Sequence[tuple[int, int]],
        program: Program,
        session: Session,
        sizes: dict[int, tuple[int, ...]],
        donate: bool,
    ):
        self._leaves, self._session = tuple(leaves), session
        self._renewed = getter([result for result, _ in replaced])
        self._hold = putter([leaf for _, leaf in replaced])
        self._sizes, self._donate = sizes, donate
        self._held: list[Any] = [_NOTHING] * len(self._leaves)
        self._holders: dict[int, list[int]] = defaultdict(list)
        for s, worker in enumerate(program):
            for buffer in worker.state:
                self._holders[buffer.value].append(s)

    def holds(self, arrays: Sequence[Any]) -> bool:
        """Returns whether these very arrays are what the workers hold."""
        return all(map(is_, arrays, self._held))

    def update(self, arrays: Sequence[Any]) -> None:
        """Loads every array that is not the one the workers hold already.

        Raises:
            BadInput: an array of another shape or dtype, or state that a step has consumed.
        """
        if self.holds(arrays):
            return
        foreign = [k for k, x in enumerate(arrays) if x is not self._held[k]]
        values = {k: read(self._leaves[k], arrays[k]) for k in foreign}
        loads: dict[tuple[int, bool], dict[Buffer, Array]] = defaultdict(dict)
        for k in foreign:
            for buffer, piece in self._pieces(k, values[k]):
                holders = self._holders[buffer.value]
                for stage in holders:  # what two stages want cannot be given away to the first
                    loads[stage, self._donate and len(holders) == 1][buffer] = piece
        for (stage, donate), load in loads.items():
            self._session.load(stage, load, donate=donate)
        for k in foreign:  # a numpy array may be changed in place: never trust that it is still the same
            self._held[k] = arrays[k] if isinstance(arrays[k], jax.Array) else _NOTHING

    def renew(self, results: Sequence[Any]) -> None:
        """Notes that the workers now hold these results as their state."""
        self._hold(self._held, self._renewed(results))

    def forget(self) -> None:
        """Notes that the workers hold nothing any more."""
        self._held = [_NOTHING] * len(self._leaves)

    def _pieces(self, k: int, x: Array) -> list[tuple[Buffer, Array]]:
        values = self._leaves[k].values
        if isinstance(x, DistributedArray):
            x = x.fetch()
        if len(values) == 1:
            return [(Buffer(values[0]), x)]
        ends = np.cumsum([self._sizes[v][0] for v in values])
        return [(Buffer(v), x[end - self._sizes[v][0] : end]) for v, end in zip(values, ends)]
