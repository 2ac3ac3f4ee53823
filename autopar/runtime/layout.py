"""Where a value lies, in JAX's words: core meshes and specs to `jax.sharding` ones."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from autopar.core.errors import PlanError
from autopar.core.mesh import Mesh
from autopar.core.program import Slot
from autopar.core.spec import Spec, text

JaxMesh = jax.sharding.Mesh | AbstractMesh
JaxDevice: TypeAlias = Any
"""A `jax.Device`, which type checkers do not see as a class."""


def jax_mesh(mesh: Mesh, devices: Sequence[JaxDevice]) -> jax.sharding.Mesh:
    """Returns `mesh` over real devices, row-major, with axes that take sharding constraints."""
    grid = np.asarray(devices, dtype=object).reshape(mesh.shape)
    return jax.sharding.Mesh(grid, mesh.names, axis_types=(AxisType.Auto,) * len(mesh.names))


def abstract_mesh(mesh: Mesh) -> AbstractMesh:
    """Returns `mesh` without devices, enough to lower and export."""
    return AbstractMesh(mesh.shape, mesh.names, axis_types=(AxisType.Auto,) * len(mesh.names))


def on_host(jmesh: JaxMesh) -> bool:
    """Returns whether a mesh has devices, and these are CPUs."""
    return isinstance(jmesh, jax.sharding.Mesh) and jmesh.devices.flat[0].platform == "cpu"


@functools.cache
def named(jmesh: JaxMesh, spec: Spec) -> NamedSharding:
    """Returns the sharding of `spec` on `jmesh`, the same object each time: that keeps dispatch fast."""
    return NamedSharding(jmesh, PartitionSpec(*(dim[0] if len(dim) == 1 else dim or None for dim in spec)))


def struct(jmesh: JaxMesh, shape: tuple[int, ...], dtype: str, spec: Spec, name: str) -> jax.ShapeDtypeStruct:
    """Returns what a compiled function takes or gives for a value kept in `spec`.

    Raises:
        PlanError: a dim that the mesh axes do not divide (JAX pads inside a program, never at its edge).
    """
    sizes = dict(zip(jmesh.axis_names, jmesh.axis_sizes))
    for d, (size, axes) in enumerate(zip(shape, spec, strict=True)):
        ways = int(np.prod([sizes[axis] for axis in axes], dtype=int))
        if size % ways:
            raise PlanError(
                f"{name} {shape}: dim {d} of size {size} cannot be kept in {ways} equal parts {text(spec)}; "
                "choose a layout whose axes divide it"
            )
    return jax.ShapeDtypeStruct(shape, as_dtype(dtype), sharding=named(jmesh, spec))


@functools.cache
def as_dtype(name: str) -> Any:
    """Returns the JAX dtype of a name in a plan; "key<fry>" is a typed PRNG key."""
    if name.startswith("key<"):
        impl = _KEYS.get(name[4:-1], name[4:-1])
        return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype
    return jnp.dtype(name)


_KEYS = {"fry": "threefry2x32", "urbg": "unsafe_rbg"}


def is_key(dtype: Any) -> bool:
    """Returns whether a dtype is that of typed PRNG keys, which numpy does not know."""
    return jnp.issubdtype(dtype, jax.dtypes.prng_key)


def slot_sharding(jmesh: JaxMesh, slot: Slot) -> NamedSharding:
    """Returns where every buffer of a slot lies on its stage's mesh."""
    return named(jmesh, slot.spec)
