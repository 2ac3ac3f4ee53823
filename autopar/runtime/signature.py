"""How a call's arguments become leaves, and leaves a result: the trees of the traced function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from autopar.core.errors import BadInput


class Signature:
    """Takes calls apart as the traced one was.

    Args:
        traced: `autopar.trace.traced.Traced`.
    """

    def __init__(self, traced: Any):
        self._traced, self._tree = traced, traced.in_tree
        self._static_args, self._static_kwargs = traced.static_args, traced.static_kwargs
        self._positions = [leaf.position for leaf in traced.leaves]
        self._whole = self._positions == list(range(self._tree.num_leaves))
        self._out_positions = [leaf.position for leaf in traced.out_leaves]
        self._out_whole = self._out_positions == list(range(traced.out_tree.num_leaves))

    def plain(self, tree: Any) -> bool:
        """Returns whether a call of this tree has nothing static in it, and the structure that was traced."""
        return self._whole and not (self._static_args or self._static_kwargs) and tree == self._tree

    def flatten(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        """Returns the array leaves of a call, static ones apart.

        Raises:
            BadInput: a tree of another structure, or another static leaf, than traced.
        """
        if self._static_args or self._static_kwargs:
            args, kwargs = self._without_statics(args, kwargs)
        leaves, tree = jax.tree.flatten((args, kwargs))
        if tree != self._tree:
            raise BadInput(self._difference(args, kwargs))
        if self._whole:
            return leaves
        for position, expected in self._traced.statics.items():
            _check_static("a static part of the arguments", leaves[position], expected)
        return [leaves[position] for position in self._positions]

    def unflatten(self, results: Sequence[Any]) -> Any:
        """Returns the result tree with these array leaves."""
        if self._out_whole:
            return jax.tree.unflatten(self._traced.out_tree, results)
        leaves = dict(self._traced.out_statics) | dict(zip(self._out_positions, results))
        return jax.tree.unflatten(self._traced.out_tree, [leaves[i] for i in range(len(leaves))])

    def _without_statics(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments as they were traced: static ones are None by position, left out by name."""
        for i, expected in self._static_args.items():
            if i < len(args):
                _check_static(f"static argument {i}", args[i], expected)
        for name, expected in self._static_kwargs.items():
            if name not in kwargs:
                raise BadInput(f"static argument {name} is missing; the step was traced for {expected!r}")
            _check_static(f"static argument {name}", kwargs[name], expected)
        shortened = tuple(None if i in self._static_args else a for i, a in enumerate(args))
        return shortened, {k: v for k, v in kwargs.items() if k not in self._static_kwargs}

    def _difference(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        expected = jax.tree.unflatten(self._tree, range(self._tree.num_leaves))
        had, got = _paths(expected), _paths((args, kwargs))
        names = {leaf.position: leaf.path for leaf in self._traced.leaves}
        missing = [names.get(had[path], path) for path in had if path not in got]
        extra = [path for path in got if path not in had]
        what = "; ".join(
            f"{word} {', '.join(paths[:3])}{' …' if len(paths) > 3 else ''}"
            for word, paths in (("missing", missing), ("not expected", extra))
            if paths
        )
        got_tree = jax.tree.structure((args, kwargs))
        return (
            "the arguments have another structure than in the traced call: "
            f"{what or f'expected {self._tree}, got {got_tree}'}; "
            "pass the same trees, positional and keyword arguments alike, or plan the step again"
        )


def _check_static(what: str, got: Any, expected: Any) -> None:
    if got is not expected and got != expected:
        raise BadInput(
            f"{what} is {got!r}, the step was traced for {expected!r}; plan and compile the step again for it"
        )


def _paths(call: Any) -> dict[str, Any]:
    """Returns path ("args[0]['w']", "kwargs['x']") → leaf of `(args, kwargs)`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(call)
    kinds = ("args", "kwargs")
    return {kinds[path[0].idx] + jax.tree_util.keystr(path[1:]): leaf for path, leaf in flat}
