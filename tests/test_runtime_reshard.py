"""Arrays between meshes of unlike sizes and layouts, compared with the array itself."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from autopar.runtime import reshard


def layouts(first, count, rank):
    devices = np.array(jax.devices()[first : first + count])
    line = Mesh(devices, ("x",), axis_types=(AxisType.Auto,))
    square = Mesh(devices.reshape(2, -1), ("y", "x"), axis_types=(AxisType.Auto,) * 2)
    specs = [P(), P("x"), P(None, "x")] if rank == 2 else [P(), P("x")]
    found = [NamedSharding(line, spec) for spec in specs]
    pairs = [P("x", "y"), P(("y", "x")), P(None, ("x", "y"))] if rank == 2 else [P(("x", "y"))]
    return found + [NamedSharding(square, spec) for spec in pairs]


@pytest.mark.parametrize(("source", "target"), [(4, 4), (4, 2), (2, 4)])
def test_every_pair_of_layouts(source, target):
    x = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    for one, two in itertools.product(layouts(0, source, 2), layouts(4, target, 2)):
        there = jax.device_put(x, one)
        (got,) = reshard.carrier([there], [two])([there])
        assert got.sharding.is_equivalent_to(two, 2)
        np.testing.assert_array_equal(np.asarray(got), x)


def test_nothing_passes_through_the_host():
    """The tiles that travel are tiles of both sides, so that no copy needs the whole array in one place."""
    x = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    for one, two in itertools.product(layouts(0, 4, 2), layouts(4, 2, 2)):
        there = jax.device_put(x, one)
        with jax.transfer_guard_device_to_host("disallow_explicit"):
            jax.block_until_ready(reshard.carrier([there], [two])([there]))


def test_what_travels():
    assert reshard.meeting((8, 8), (4, 1), source=4, destination=4) == (4, 1)
    assert reshard.meeting((8, 8), (4, 1), source=2, destination=4) == (2, 1)  # cut finer on arrival
    assert reshard.meeting((8, 16), (1, 1), source=4, destination=4) == (1, 4)  # a shard each, gathered there
    assert reshard.meeting((8, 8), (2, 1), source=3, destination=2) == (1, 1)
    assert reshard.meeting((), (), source=4, destination=2) == ()
    assert reshard.meeting((6,), (3,), source=4, destination=3) == (1,)


def test_typed_keys_and_scalars_travel():
    mesh = Mesh(np.array(jax.devices()[4:6]), ("x",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, P())
    here = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("x",), axis_types=(AxisType.Auto,)), P())
    key, one = jax.device_put(jax.random.key(3), here), jax.device_put(np.float32(1), here)
    got = reshard.carrier([key, one], [whole, whole])([key, one])
    assert (
        got[0].dtype == key.dtype
        and (jax.random.key_data(got[0]) == jax.random.key_data(jax.random.key(3))).all()
    )
    assert got[1].sharding.device_set == set(jax.devices()[4:6])
