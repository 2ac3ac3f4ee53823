"""Arrays made where they live, side by side in large blocks of host memory."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from autopar.core.program import Slot
from autopar.core.spec import replicated
from autopar.runtime import fill as room


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 70)), max_size=12))
def test_copies_are_equal_apart_and_aligned(shapes: list[tuple[int, int]]):
    arena = room.Arena()
    made = [np.full(shape, k, np.float32) for k, shape in enumerate(shapes)]
    copies = [arena.copy(x) for x in made]
    for x, copy in zip(made, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
        assert copy.ctypes.data % room.ALIGNMENT == 0


def test_a_large_array_gets_a_block_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(room, "BLOCK", 1 << 10)
    arena, x = room.Arena(), np.arange(5000, dtype=np.float64)
    first = arena.copy(np.ones(3, ml_dtypes.bfloat16))
    np.testing.assert_array_equal(arena.copy(x), x)
    assert first.tolist() == [1, 1, 1]


@pytest.mark.parametrize("spec", [PartitionSpec(), PartitionSpec("x"), PartitionSpec(None, "x")])
def test_each_device_has_its_slice_where_it_was_read(spec: PartitionSpec):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    whole, asked = np.arange(64, dtype=np.float64).reshape(8, 8), list[tuple[slice, ...]]()

    def read(index: tuple[slice, ...]) -> np.ndarray:
        asked.append(index)
        return whole[index]

    slot = Slot(0, (8, 8), "float32", replicated(2), 256)
    made = room.fill(slot, NamedSharding(mesh, spec), read, room.Arena())
    np.testing.assert_array_equal(made, whole.astype(np.float32))
    assert len(asked) == (1 if spec == PartitionSpec() else 4)
    assert all(s.data.unsafe_buffer_pointer() % room.ALIGNMENT == 0 for s in made.addressable_shards)
