"""Which arguments are state (the result replaces them) and which are the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from autopar.core.errors import BadInput
from autopar.trace.arguments import Call, Tree


@dataclass(frozen=True)
class Roles:
    """What the array leaves of the arguments are.

    Attributes:
        aliases: (position among the result's arrays, position among the arguments'): its next value.
        batch: per argument array, whether it is cut into micro-batches.
    """

    aliases: tuple[tuple[int, int], ...]
    batch: tuple[bool, ...]


def roles(
    call: Call,
    tree: Tree,
    shapes: Sequence[Any],
    result: Tree,
    batch_argnums: Sequence[int] | None,
    microbatches: int,
) -> Roles:
    """Returns which leaves are state and which are the batch.

    An argument is state when its tree (structure, shapes, dtypes) equals a tree in the result: the result
    itself or one of its elements. Each part of the result is the next value of one argument only.

    Args:
        call: the arguments.
        tree: the same taken apart.
        shapes: of its arrays.
        result: the result taken apart.
        batch_argnums: positions of the arguments that are the batch; None: every other one whose arrays
            agree on a leading dim of at least `microbatches`.
        microbatches: how many.
    Raises:
        BadInput: a position that does not exist.
    """
    parts = _parts(tree, shapes)
    chosen = None if batch_argnums is None else {_position(n, len(call.args)) for n in batch_argnums}
    aliases: list[tuple[int, int]] = []
    taken: set[int] = set()
    state: set[Any] = set()
    for key, part in parts.items():
        if chosen is not None and key in chosen:
            continue
        match = None if _ambiguous(part, key, parts) else _find(part, result, taken)
        if match is not None:
            taken.update(match)
            aliases += zip(match, part.members)
            state.add(key)
    batch = [False] * len(shapes)
    for key, part in parts.items():
        if key not in state if chosen is None else key in chosen:
            splittable = [i for i in part.members if _can_split(shapes[i])]
            sizes = {shapes[i].shape[0] for i in splittable}
            if chosen is not None or (len(sizes) == 1 and min(sizes) >= microbatches):
                for i in splittable:
                    batch[i] = True
    return Roles(tuple(sorted(aliases)), tuple(batch))


@dataclass(frozen=True)
class _Part:
    """A subtree: its structure, its arrays' shapes and dtypes, and their positions."""

    structure: Any
    kinds: tuple[Any, ...]
    members: tuple[int, ...]


def _parts(tree: Tree, shapes: Sequence[Any]) -> dict[Any, _Part]:
    """Returns the arguments: position or name → part."""
    args, kwargs = tree.fill([_Slot(i) for i in range(len(shapes))])
    keyed = {**dict(enumerate(args)), **kwargs}
    found = {}
    for key, argument in keyed.items():
        part = _part(argument, shapes)
        if part.members:
            found[key] = part
    return found


@dataclass(frozen=True)
class _Slot:
    """A leaf that remembers which array it stands for."""

    position: int


def _part(subtree: Any, shapes: Sequence[Any]) -> _Part:
    leaves, structure = jax.tree.flatten(subtree)
    slots = [leaf.position if isinstance(leaf, _Slot) else None for leaf in leaves]
    kinds = tuple(
        _Static(leaf) if slot is None else (tuple(shapes[slot].shape), shapes[slot].dtype)
        for leaf, slot in zip(leaves, slots)
    )
    return _Part(structure, kinds, tuple(s for s in slots if s is not None))


@dataclass(frozen=True)
class _Static:
    """A leaf that is not an array, compared by identity or equality."""

    value: Any


def _ambiguous(part: _Part, key: Any, parts: dict[Any, _Part]) -> bool:
    """Returns whether a part may be like a result by chance: scalars, one array that does not come first."""
    if all(not shape for shape, *_ in (k for k in part.kinds if isinstance(k, tuple))):
        return True
    alone = len(part.kinds) == 1 and jax.tree_util.treedef_is_leaf(part.structure)
    return alone and not (key == 0 and len(parts) > 1)


def _find(part: _Part, result: Tree, taken: set[int]) -> tuple[int, ...] | None:
    """Returns the positions of the result's arrays that have the part's tree, None if there are none."""
    whole = result.fill([_Slot(i) for i in range(len(result.arrays))])
    for candidate in [whole, *_children(whole)]:
        other = _part(candidate, result.arrays)
        same = other.structure == part.structure and other.kinds == part.kinds
        if same and not taken & set(other.members):
            return other.members
    return None


def _children(tree: Any) -> list[Any]:
    if jax.tree_util.all_leaves([tree]):
        return []
    root = tree
    return jax.tree.leaves(root, is_leaf=lambda x: x is not root)


def _can_split(shape: Any) -> bool:
    """Returns whether an array can be cut along dim 0: no scalar, no PRNG key, typed or as two words."""
    if not shape.shape or str(shape.dtype).startswith("key<"):
        return False
    return not (shape.shape == (2,) and shape.dtype == "uint32")


def _position(number: int, count: int) -> int:
    if not -count <= number < count:
        raise BadInput(f"batch_argnums: there are {count} positional arguments, no number {number}")
    return number % count
