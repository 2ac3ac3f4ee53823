"""The likeliest tokens are numpy's argmax, the lowest among equals, and -1 beside a NaN."""

from __future__ import annotations

from collections.abc import Callable

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from autopar.api.likeliest import likeliest, likeliest_by_parts

SEVERAL = st.sampled_from([-np.inf, -1.5, 0.0, 2.0, 2.5, np.inf, np.nan])


@pytest.mark.parametrize("choose", [likeliest, likeliest_by_parts])
@settings(deadline=None)  # each shape is compiled
@given(
    # a part, two parts, many, a prime number of logits; few values, so that many are equal
    arrays.arrays(np.float32, st.tuples(st.just(3), st.sampled_from([7, 512, 514, 257])), elements=SEVERAL)
)
def test_as_numpy_says(choose: Callable[..., np.ndarray], logits: np.ndarray):
    wanted = np.where(np.isnan(logits).any(-1), -1, logits.argmax(-1))
    np.testing.assert_array_equal(jax.jit(choose)(logits), wanted)


def test_where_all_differ():
    logits = np.random.default_rng(0).permutation(8 * 50272).reshape(8, 50272).astype(np.float32)
    np.testing.assert_array_equal(likeliest_by_parts(logits), logits.argmax(-1))
