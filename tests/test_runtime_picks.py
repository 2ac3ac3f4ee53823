"""Picking and putting by position equal the loops they stand for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autopar.runtime.picks import getter, putter


@given(st.permutations(range(8)), st.integers(0, 8))
def test_what_is_got_and_put_back_is_what_a_loop_gets_and_puts(order: list[int], count: int):
    positions, items = order[:count], [f"x{k}" for k in range(8)]
    assert list(getter(positions)(items)) == [items[k] for k in positions]
    target, wanted = list(range(8)), list[object](range(8))
    putter(positions)(target, tuple(items[:count]))
    for k, item in zip(positions, items):
        wanted[k] = item
    assert target == wanted
