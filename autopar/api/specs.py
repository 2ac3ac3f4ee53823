"""Layouts that a user wrote down: paths and PartitionSpecs become pinned layouts, or an error in words."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from autopar.core.errors import BadInput
from autopar.core.mesh import Mesh
from autopar.core.spec import Spec, text
from autopar.sharding.explain import tokens
from autopar.trace.traced import Traced

Pins = tuple[tuple[int, Spec], ...]


def pinned(traced: Traced, mesh: Mesh, specs: Mapping[str, Any], where: str) -> Pins:
    """Returns (value id, layout) for every tensor that the specs name.

    Args:
        specs: path or name → PartitionSpec. where: the user's line, for messages.

    Raises:
        BadInput: a path that names nothing, an axis that the mesh lacks or that is used twice, a dim that
            cannot be cut, two specs that say different things about one tensor.
    """
    at = f"Manual at {where}: " if where else "Manual: "
    names = named(traced)
    said: dict[int, tuple[str, Spec]] = {}
    for pattern, wanted in specs.items():
        for v in matching(names, pattern, at):
            spec = layout(traced, v, wanted, mesh, f"{at}{pattern!r}")
            if v in said and said[v][1] != spec:
                first, other = said[v]
                raise BadInput(
                    f"{at}{first!r} says {text(other)} and {pattern!r} says {text(spec)} about "
                    f"{'/'.join(names[v])}; keep one of them"
                )
            said[v] = (pattern, spec)
    return tuple((v, spec) for v, (_, spec) in said.items())


def named(traced: Traced) -> dict[int, tuple[str, ...]]:
    """Returns value id → the parts of its path: arguments, and intermediates that were given a name."""
    graph = traced.graph
    arguments = {v: tokens(graph.values[v].name) for v in graph.inputs if graph.values[v].name}
    inner = {e.outvars[0]: str(e.params["name"]) for e in traced.equations if e.primitive.name == "name"}
    ids = {var: v for v, var in enumerate(traced.values) if var in inner}
    return arguments | {v: tokens(inner[var]) for var, v in ids.items()}


def matching(names: Mapping[int, tuple[str, ...]], pattern: str, at: str) -> list[int]:
    """Returns the tensors whose path ends in the pattern. Raises BadInput if there is none."""
    parts = tokens(pattern)

    def ends(path: Sequence[str]) -> bool:
        tail = path[-len(parts) :]
        return len(tail) == len(parts) and all(map(fnmatch.fnmatchcase, tail, parts))

    found = [v for v, path in names.items() if parts and ends(path)]
    if not found:
        known = ["/".join(path) for path in names.values()]
        close = difflib.get_close_matches("/".join(parts), known, n=3, cutoff=0.3) or known[:3]
        raise BadInput(
            f"{at}no argument or named intermediate is called {pattern!r}; did you mean "
            f"{' or '.join(close)}? (jax.ad_checkpoint.checkpoint_name names an intermediate)"
        )
    return found


def layout(traced: Traced, v: int, wanted: Any, mesh: Mesh, at: str) -> Spec:
    """Returns the layout that a PartitionSpec means for a value. Raises BadInput."""
    value, name = traced.graph.values[v], traced.graph.values[v].name or "the intermediate"
    about = f"{at} ({name} {value}{_made_at(traced, v)})"
    try:
        entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in wanted]
    except TypeError:
        raise BadInput(f"{about}: expected a PartitionSpec, got {wanted!r}") from None
    if len(entries) > len(value.shape):
        raise BadInput(
            f"{about}: {wanted} has {len(entries)} entries, but the tensor {len(value.shape)} dims"
        )
    entries += [()] * (len(value.shape) - len(entries))
    axes = [axis for dim in entries for axis in dim]
    for axis in axes:
        if axis not in mesh.names:
            have = ", ".join(f"{a.name} ({a.size})" for a in mesh.axes)
            raise BadInput(f"{about}: {wanted} names the axis {axis!r}, but the mesh has {have}")
        if axes.count(axis) > 1:
            raise BadInput(f"{about}: {wanted} uses the axis {axis!r} twice; a tensor can use each once")
    for d, (size, dim) in enumerate(zip(value.shape, entries, strict=True)):
        ways = mesh.ways(dim)
        if size % ways:
            fitting = [e for e, n in enumerate(value.shape) if n % ways == 0 and e != d]
            hint = f"cut dim {fitting[0]} ({value.shape[fitting[0]]})" if fitting else "use fewer axes"
            raise BadInput(
                f"{about}: dim {d} of size {size} cannot be cut into {ways} equal parts over "
                f"{' and '.join(dim)}; {hint}, or pad it to {-(-size // ways) * ways}"
            )
    return tuple(entries)


def _made_at(traced: Traced, v: int) -> str:
    """Where the user's code makes a value: " from model.py:41", or nothing for an argument."""
    maker = traced.graph.producers().get(v)
    source = "" if maker is None else traced.graph.equations[maker].source
    return f" from {source}" if source else ""
