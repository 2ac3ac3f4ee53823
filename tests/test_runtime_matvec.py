"""Many matrices with a vector each: written as sums, they are what `lax.dot_general` gives."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import ShapeDtypeStruct, lax

import autopar
from autopar.cluster import Cluster, Node, device
from autopar.runtime import matvec


@st.composite
def products(draw):
    """Operands in any order of dims, and their dimension numbers."""
    sizes = {"a": 4, "b": 3, "sum": draw(st.sampled_from((32, 48, 64))), "out": draw(st.integers(2, 5))}
    matrix = draw(st.permutations(["a", "b", "sum", "out"]))
    vector = draw(st.permutations(["a", "b", "sum"] + ["one"] * draw(st.integers(0, 2))))
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal([sizes.get(d, 1) for d in dims], np.float32) for dims in (matrix, vector)]
    names, swapped = [matrix, vector], draw(st.booleans())
    if swapped:
        arrays, names = arrays[::-1], names[::-1]
    numbers = (tuple([n.index("sum")] for n in names), tuple([n.index("a"), n.index("b")] for n in names))
    return *map(jnp.asarray, arrays), numbers


@settings(deadline=None, max_examples=60)
@given(products())
def test_it_is_the_product(found):
    lhs, rhs, numbers = found
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matvec, "LEAST", 0)
        patch.setattr(matvec, "MANY", 0)
        got, want = matvec.product(lhs, rhs, numbers), lax.dot_general(lhs, rhs, numbers)
    assert got is not None and got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize(
    "lhs, rhs, numbers",
    [
        ((96, 4, 64), (96, 64, 128), (((2,), (1,)), ((0,), (0,)))),  # several vectors for each matrix
        ((96, 64), (96, 64), (((1,), (1,)), ((0,), (0,)))),  # vectors on both sides
        ((64,), (64, 8192), (((0,), (0,)), ((), ()))),  # one matrix
        ((96, 72), (96, 72, 256), (((1,), (1,)), ((0,), (0,)))),  # not so many equal parts
        ((96, 64), (96, 64, 8), (((1,), (1,)), ((0,), (0,)))),  # small
        ((64, 4096), (64, 4096, 64), (((1,), (1,)), ((0,), (0,)))),  # a long sum
        ((96, 8, 8), (96, 8, 8, 256), (((1, 2), (1, 2)), ((0,), (0,)))),  # over two dims
        ((32, 64), (32, 64, 256), (((1,), (1,)), ((0,), (0,)))),  # few
    ],
)
def test_other_products_are_left_to_the_compiler(lhs, rhs, numbers):
    assert matvec.product(jnp.zeros(lhs), jnp.zeros(rhs), numbers) is None


def test_other_dtypes_are_left_to_the_compiler():
    lhs, rhs = jnp.zeros((96, 64), jnp.bfloat16), jnp.zeros((96, 64, 256), jnp.bfloat16)
    assert matvec.product(lhs, rhs, (((1,), (1,)), ((0,), (0,)))) is None


@pytest.mark.parametrize("devices, products", [(1, 0), (2, 2)])
def test_one_host_device_computes_them_on_all_cores(devices, products):
    def step(keys, query):
        weights = jnp.einsum("rhs,rhts->rht", query, keys)
        return jnp.einsum("rht,rhts->rhs", weights, keys)

    shapes = ShapeDtypeStruct((8, 12, 128, 64), "float32"), ShapeDtypeStruct((8, 12, 64), "float32")
    cluster = Cluster((Node("n", device("A100-40GB"), devices),))
    run = autopar.parallelize(step, method=autopar.DataParallel(), cluster=cluster, batch_argnums=(0, 1))
    (text,) = run.compile(*shapes).hlo().values()
    assert text.count(" dot(") == products
