"""Whose turn it is: weighted fair shares between keys, first come first served within one.

Each key has a counter of the service it got, in tokens by weight; the waiting key with the smallest goes
next. A key that comes back after a pause starts from the others' level, so that idling saves up nothing.
(Sheng et al. 2024, "Fairness in Serving Large Language Models", the virtual token counter.)
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Generic, TypeVar

T = TypeVar("T")
PROMPT_COST, ANSWER_COST = 1.0, 2.0
"""Service that a token counts for: one that is read and one that is written (the paper's prices)."""


class FairQueue(Generic[T]):
    """Waiting items by key."""

    def __init__(self, weights: Mapping[str, float] | None = None):
        """Args: weights: share of a key relative to others' (1 for keys that are not named)."""
        self._weights = dict(weights or {})
        self._queues: dict[str, deque[tuple[int, T]]] = {}
        self._service: defaultdict[str, float] = defaultdict(float)
        self._level = 0.0  # counter of the key that was last served
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, key: str, order: int, item: T) -> None:
        """Adds an item; `order` is its number by arrival."""
        if key not in self._queues:
            level = min((self._service[other] for other in self._queues), default=self._level)
            self._service[key] = max(self._service[key], level)
            self._queues[key] = deque()
        self._queues[key].append((order, item))
        self._size += 1

    def peek(self) -> T | None:
        """Returns the item whose turn it is, or None."""
        key = self._next()
        return None if key is None else self._queues[key][0][1]

    def pop(self) -> T:
        """Removes and returns the item whose turn it is."""
        key = self._next()
        assert key is not None
        _, item = self._queues[key].popleft()
        self._level = self._service[key]
        self._forget_if_empty(key)
        return item

    def remove(self, key: str, item: T) -> bool:
        """Removes an item; returns whether it was there."""
        queue = self._queues.get(key, deque())
        for at, (_, waiting) in enumerate(queue):
            if waiting is item:
                del queue[at]
                self._forget_if_empty(key)
                return True
        return False

    def charge(self, key: str, service: float) -> None:
        """Counts service that a key got."""
        self._service[key] += service / self._weights.get(key, 1.0)

    def items(self) -> list[T]:
        """Returns what waits, by arrival."""
        waiting = [entry for queue in self._queues.values() for entry in queue]
        return [item for _, item in sorted(waiting, key=lambda entry: entry[0])]

    def _next(self) -> str | None:
        return min(self._queues, key=lambda k: (self._service[k], self._queues[k][0][0]), default=None)

    def _forget_if_empty(self, key: str) -> None:
        self._size -= 1
        if not self._queues[key]:
            del self._queues[key]
