"""Moves of one value that begin alike: a compiler makes them once, and so a plan counts them."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from autopar.core.graph import Phase, Value
from autopar.core.mesh import Axis, Device, Mesh
from autopar.sharding.result import Reader, common
from autopar.sharding.ways.grid import grid_of
from autopar.sharding.ways.resharding import hops

MESH = Mesh(
    Device("test", 1 << 34, 1e12, (("float32", 1e13),), 1e11),
    (Axis("x", 2, 1e9, 1e-6), Axis("y", 4, 1e10, 1e-6)),
)
SHAPE = (64, 64)
HOME, GATHERED, TURNED = (("x",), ("y",)), ((), ("y",)), (("y",), ())


def read(*wanted):
    """Returns (kind, bytes) of all that is sent where a value is read in these layouts."""
    grid = grid_of(MESH)
    model = SimpleNamespace(value=lambda _: Value(SHAPE, "float32"))
    region = SimpleNamespace(program=lambda _: "step")
    reader = Reader(region, model, grid, lambda value: 4 * value.size, (), False)  # type: ignore[arg-type]
    for want in wanted:
        reader._move(((), 0), grid.layout(HOME), grid.layout(want), Phase.FORWARD, 1)
    return reader.out


def test_what_two_readers_need_first_is_counted_once():
    chains = [hops(HOME, want, SHAPE, MESH) for want in (GATHERED, TURNED)]
    assert chains[0] == chains[1][:1] and len(chains[1]) == 2, "the second begins as the first"
    one, other, both = read(GATHERED), read(TURNED), read(GATHERED, TURNED)
    assert len(other.collectives) == len(both.collectives) == 2 and len(one.collectives) == 1
    assert both.seconds == other.seconds
    assert read(TURNED, GATHERED).seconds == other.seconds


def test_what_is_made_wherever_it_is_read_needs_no_collective():
    """A lazy value that readers want in several layouts is made in one of which each takes a part."""
    fine, coarse = ((0, 1), ()), ((0,), ())
    assert common([fine, coarse]) == common([coarse, fine]) == coarse
    assert common([fine]) == fine and common([fine, ((1,), (0,))]) == ((), ())
    spec = grid_of(MESH).spec
    assert all(hops(spec(coarse), spec(x), SHAPE, MESH) == (spec(x),) for x in (fine, ((0,), (1,))))


def test_a_compiler_makes_it_once():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

    def moved(x, want):
        for stop in hops(HOME, want, SHAPE, MESH):
            x = at(x, stop)
        return x

    def at(x, spec):
        axes = [each[0] if each else None for each in spec]
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def step(x):
        y = at(jnp.tanh(at(x, HOME)), HOME)
        return at(jnp.exp(moved(y, GATHERED)), GATHERED), at(jnp.sin(moved(y, TURNED)), TURNED)

    given = jax.ShapeDtypeStruct(SHAPE, "float32", sharding=NamedSharding(mesh, PartitionSpec("x", "y")))
    text = jax.jit(step).lower(given).compile().as_text() or ""
    assert len(re.findall(r"= \S+ all-gather\(", text)) == 1
