"""Picking positions out of sequences and putting items back, in one call whatever their number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any


def getter(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Returns a function that picks these positions of a sequence (`itemgetter`, for any number of them)."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return lambda items: tuple(items[k] for k in positions)


def putter(positions: Sequence[int]) -> Callable[[list[Any], Sequence[Any]], None]:
    """Returns a function that puts items, in order, at these positions of a list.

    In one assignment where the positions are side by side, in whatever order.
    """
    if positions and sorted(positions) == list(range(min(positions), min(positions) + len(positions))):
        place = slice(min(positions), min(positions) + len(positions))
        order = sorted(range(len(positions)), key=positions.__getitem__)
        pick = None if order == list(range(len(order))) else getter(order)

        def put_side_by_side(target: list[Any], items: Sequence[Any]) -> None:
            target[place] = items if pick is None else pick(items)

        return put_side_by_side

    def put(target: list[Any], items: Sequence[Any]) -> None:
        for k, item in zip(positions, items, strict=True):
            target[k] = item

    return put
