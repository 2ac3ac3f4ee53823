"""A large matrix with few vectors: however it is written, it is what `lax.dot_general` gives."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import ShapeDtypeStruct, lax

import autopar
from autopar.cluster import Cluster, Node, device
from autopar.runtime import skinny


@st.composite
def products(draw):
    """Matrix `[out…, sum…]` and vectors with dims in any order, either first, and their dimension numbers."""
    out = draw(st.lists(st.sampled_from((4, 6, 12)), min_size=1, max_size=2))
    sums = draw(st.lists(st.sampled_from((8, 12, 40)), min_size=1, max_size=2))
    free = draw(st.sampled_from(([], [1], [2], [1, 4], [2, 2], [8])))
    order = draw(st.permutations(range(len(sums) + len(free))))
    rng = np.random.default_rng(0)
    sizes = [*sums, *free]
    matrix = rng.standard_normal([*out, *sums], np.float32)
    vectors = rng.standard_normal([sizes[d] for d in order], np.float32)
    over = tuple(range(len(out), matrix.ndim)), tuple(order.index(d) for d in range(len(sums)))
    swapped = draw(st.booleans())
    arrays, over = ((vectors, matrix), over[::-1]) if swapped else ((matrix, vectors), over)
    return *map(jnp.asarray, arrays), (over, ((), ()))


@settings(deadline=None, max_examples=40)
@given(products(), st.sampled_from((2, 4)), st.sampled_from((64, 128, 256)))
def test_it_is_the_product(found, cores, page):
    lhs, rhs, numbers = found
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LEAST": 0, "PAGE": page, "cores": lambda: cores}.items():
            patch.setattr(skinny, name, value)
        got, want = skinny.product(lhs, rhs, numbers, (True, True)), lax.dot_general(lhs, rhs, numbers)
    if got is not None:
        assert got.shape == want.shape and got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=1e-4)


OVER = (((1,), (1,)), ((), ()))
CASES = {
    "one vector": ((1024, 768), (1, 768), OVER, True),
    "one vector, rows that cores cannot share": ((1025, 768), (1, 768), OVER, False),
    "eight vectors, short rows": ((1024, 768), (8, 768), OVER, True),
    "the vectors first": ((8, 768), (1024, 768), OVER, True),
    "eight vectors, rows of a page": ((1024, 1024), (8, 1024), OVER, False),
    "sixteen vectors": ((1024, 768), (16, 768), OVER, False),
    "rows so short that three make a page": ((1020, 384), (5, 384), OVER, True),
    "six vectors of such": ((1020, 384), (6, 384), OVER, False),
    "an odd number of rows": ((1025, 768), (8, 768), OVER, False),
    "a small matrix": ((256, 768), (8, 768), OVER, False),
    "summed over its first dim": ((768, 1024), (8, 768), (((0,), (1,)), ((), ())), False),
    "a matrix for each": ((8, 1024, 768), (8, 768, 1), (((2,), (1,)), ((0,), (0,))), False),
}


@pytest.mark.parametrize("name", CASES)
def test_which_products_are_rewritten(name, monkeypatch):
    lhs, rhs, numbers, rewritten = CASES[name]
    monkeypatch.setattr(skinny, "cores", lambda: 2)
    monkeypatch.setattr(skinny, "PAGE", 4096)
    got = skinny.product(jnp.ones(lhs), jnp.ones(rhs), numbers, (True, True))
    assert (got is not None) == rewritten
    if got is not None:
        np.testing.assert_array_equal(got, lax.dot_general(jnp.ones(lhs), jnp.ones(rhs), numbers))


def test_other_dtypes_and_what_a_step_computes_are_left_to_the_compiler():
    lhs, rhs = jnp.ones((1024, 768)), jnp.ones((8, 768))
    assert skinny.product(lhs, rhs, OVER) is None  # rows in groups would spread what is not finite
    assert skinny.product(lhs.astype("bfloat16"), rhs.astype("bfloat16"), OVER, (True, True)) is None


def test_what_is_not_finite_stays_with_its_vector_and_its_group():
    matrix, vectors = np.ones((1024, 768), np.float32), np.ones((8, 768), np.float32)
    matrix[6, 5], vectors[3, 7] = np.inf, np.nan
    y = np.asarray(skinny.product(jnp.asarray(matrix), jnp.asarray(vectors), OVER, (True, False)))
    wrong = ~np.isfinite(y)
    assert wrong[:, 3].all() and wrong[6:8].all()
    wrong[:, 3], wrong[6:8] = False, False
    assert not wrong.any()


@pytest.mark.parametrize(
    "rows, devices, batch, grouped",
    [(8, 1, (1,), True), (32, 1, (1,), False), (8, 2, (1,), False), (8, 1, (0, 1), False)],
    ids=["few vectors", "many", "on two devices", "a matrix of the batch"],
)
def test_one_host_device_reads_short_rows_of_weights_in_groups(rows, devices, batch, grouped):
    def step(weight, x):
        return jnp.einsum("oi,ri->ro", weight, x).sum(0)

    shapes = ShapeDtypeStruct((1024, 768), "float32"), ShapeDtypeStruct((rows, 768), "float32")
    cluster = Cluster((Node("n", device("A100-40GB"), devices),))
    run = autopar.parallelize(step, method=autopar.DataParallel(), cluster=cluster, batch_argnums=batch)
    (text,) = run.compile(*shapes).hlo().values()
    assert ("f32[512,1536]" in text) == grouped
