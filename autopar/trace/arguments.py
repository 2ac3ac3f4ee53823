"""Trees of arguments and results: which leaves are arrays, what they are called, what is static."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from autopar.core.errors import BadInput, TraceError
from autopar.trace.compat import Line


@dataclass(frozen=True)
class Tree:
    """A pytree taken apart.

    Attributes:
        structure: of the whole tree.
        paths: key path of each array leaf.
        arrays: the array leaves, in order.
        positions: which leaf of the whole tree each array is.
        statics: position → leaf that is not an array.
    """

    structure: Any
    paths: tuple[Any, ...]
    arrays: tuple[Any, ...]
    positions: tuple[int, ...]
    statics: Mapping[int, Any]

    def fill(self, arrays: Sequence[Any]) -> Any:
        """Returns the tree with `arrays` in place of its array leaves."""
        return filled(self.structure, self.positions, self.statics, arrays)


def filled(
    structure: Any, positions: Sequence[int], statics: Mapping[int, Any], arrays: Sequence[Any]
) -> Any:
    """Returns the tree of `structure` with `arrays` at `positions` and `statics` at theirs."""
    leaves = dict(statics) | dict(zip(positions, arrays, strict=True))
    return jax.tree.unflatten(structure, [leaves[i] for i in range(structure.num_leaves)])


def take_apart(tree: Any, describe: Callable[[Any], str], where: Line | None = None) -> Tree:
    """Returns the array leaves of `tree` apart from the static ones.

    Arrays, numpy arrays, `ShapeDtypeStruct`s and Python numbers are arrays, as for `jax.jit`; functions are
    static.
    Inside of an equinox module whatever is no array is static, numbers too: its code branches on them.

    Args:
        tree: any pytree.
        describe: key path → words for a message.
        where: the user's line for a message.
    Raises:
        TraceError: a leaf is neither, such as a string.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    modules = _in_modules(tree)
    paths, arrays, positions, statics = [], [], [], {}
    for i, ((path, leaf), in_module) in enumerate(zip(flat, modules)):
        if _is_array(leaf) or (_is_number(leaf) and not in_module):
            paths.append(path)
            arrays.append(leaf)
            positions.append(i)
        elif in_module or callable(leaf):
            statics[i] = leaf
        else:
            raise TraceError(_not_an_array(describe(path), leaf, where))
    return Tree(structure, tuple(paths), tuple(arrays), tuple(positions), statics)


def _not_an_array(name: str, leaf: Any, where: Line | None) -> str:
    at = f" of the function at {where}" if where else ""
    return (
        f"{name}{at}: expected an array or a number, got {leaf!r} of type {type(leaf).__name__}; "
        "pass it as a static argument (static_argnums, static_argnames) or keep it out of the tree"
    )


def _is_array(leaf: Any) -> bool:
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind in "biufcV"  # V: bfloat16 and other types of ml_dtypes
    return isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or (
        hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not isinstance(leaf, type)
    )


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | complex)


def _in_modules(tree: Any) -> list[bool]:
    """Returns per leaf whether it lies in an equinox module (equinox is imported if there is one)."""
    equinox = sys.modules.get("equinox")
    count = len(jax.tree.leaves(tree))
    if equinox is None:
        return [False] * count
    outer = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, equinox.Module))
    found: list[bool] = []
    for x in outer:
        inside = isinstance(x, equinox.Module)
        found += [inside] * (len(jax.tree.leaves(x)) if inside else 1)
    return found


def shapes(arrays: Sequence[Any]) -> list[jax.ShapeDtypeStruct]:
    """Returns shape and dtype of each array as JAX takes it: numpy's float64 as float32, numbers as weak."""
    return list(jax.eval_shape(lambda *xs: xs, *arrays))


@dataclass(frozen=True)
class Call:
    """The arguments of one call, static ones apart.

    Attributes:
        args: positional arguments, None in place of static ones.
        kwargs: keyword arguments without the static ones.
        static_args: position → value.
        static_kwargs: name → value.
        names: of the positional arguments, for messages and paths.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    static_args: Mapping[int, Any]
    static_kwargs: Mapping[str, Any]
    names: tuple[str, ...]

    def apply(self, fun: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Returns `fun` of these dynamic arguments and the call's static ones."""
        whole = [self.static_args.get(i, a) for i, a in enumerate(args)]
        return fun(*whole, **kwargs, **self.static_kwargs)

    def describe(self, path: Sequence[Any]) -> str:
        """Returns the name of a leaf of `(args, kwargs)`: "state.params['Block_0']['kernel']"."""
        kind, which, *rest = path
        name = self.names[which.idx] if kind.idx == 0 else which.key
        return name + jax.tree_util.keystr(tuple(rest))


def split_call(
    fun: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    static_argnums: Sequence[int] = (),
    static_argnames: Sequence[str] = (),
) -> Call:
    """Returns the arguments of `fun(*args, **kwargs)` with the static ones apart.

    A name in `static_argnames` also holds for an argument given by position, and a number in `static_argnums`
    for one given by name.

    Raises:
        BadInput: a number or a name that the function does not have.
    """
    names = argument_names(fun, len(args))
    known = _parameters(fun)
    numbers = {_checked(n, len(known) or len(args), fun) for n in static_argnums}
    for name in static_argnames:
        if name not in kwargs and known and name not in known and not _takes_any_keyword(fun):
            raise BadInput(
                f"static_argnames: {_name(fun)} has no argument {name!r}; it has {', '.join(known)}"
            )
    chosen = set(static_argnames) | {known[n] for n in numbers if n < len(known)}
    static_args = {i: a for i, a in enumerate(args) if i in numbers or names[i] in chosen}
    static_kwargs = {k: v for k, v in kwargs.items() if k in chosen}
    return Call(
        args=tuple(None if i in static_args else a for i, a in enumerate(args)),
        kwargs={k: v for k, v in kwargs.items() if k not in chosen},
        static_args=static_args,
        static_kwargs=static_kwargs,
        names=names,
    )


def argument_names(fun: Callable[..., Any], count: int) -> tuple[str, ...]:
    """Returns the names of the first `count` positional parameters of `fun`, "args[i]" where it has none."""
    known = _parameters(fun)[:count]
    return (*known, *(f"args[{i}]" for i in range(len(known), count)))


def _parameters(fun: Callable[..., Any]) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):
        return ()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in positional)


def _takes_any_keyword(fun: Callable[..., Any]) -> bool:
    kinds = {p.kind for p in inspect.signature(fun).parameters.values()}
    return bool(kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.KEYWORD_ONLY})


def _checked(number: int, count: int, fun: Callable[..., Any]) -> int:
    if not -count <= number < count:
        raise BadInput(
            f"static_argnums: {_name(fun)} takes {count} positional arguments, there is no {number}"
        )
    return number % count


def _name(fun: Callable[..., Any]) -> str:
    return getattr(fun, "__name__", type(fun).__name__)
