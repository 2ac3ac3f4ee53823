"""Leaves that are no single `jax.Array` of this process: held by another process, or in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from autopar.core.errors import BadInput
from autopar.core.program import Buffer
from autopar.runtime.backend import Session
from autopar.runtime.layout import is_key

Array = Any


@dataclass(slots=True)
class Generation:
    """The state that one step returned. `consumed`: the number of the step that took it, once one has."""

    consumed: int | None = None


@dataclass(frozen=True, slots=True)
class Home:
    """Where a leaf lives: its pieces along dim 0, in order, each a buffer of a stage."""

    pieces: tuple[tuple[int, Buffer], ...]


class DistributedArray:
    """An array that lives elsewhere; `np.asarray(x)` fetches it.

    Args:
        name: the leaf, for messages ("state.params['kernel']").
        shape, dtype: of the whole.
        session, home: who holds it and where.
        generation: whose state it is; None for a result that was asked for at once and never becomes stale.
        pending: functions that give the pieces that were asked for at once, in order.

    Attributes:
        shape, dtype, ndim, size, nbytes: as of numpy arrays.
    """

    __slots__ = ("_generation", "_pending", "dtype", "home", "name", "session", "shape")

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: Any,
        session: Session,
        home: Home,
        generation: Generation | None,
        pending: Sequence[Callable[[], Sequence[Array]]] | None = None,
    ):
        self.name, self.shape, self.dtype = name, shape, dtype
        self.session, self.home = session, home
        self._generation, self._pending = generation, pending

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=int))

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def deferred(self) -> bool:
        """Whether nothing was asked for yet: it is fetched when it is needed."""
        return self._pending is None

    def is_deleted(self) -> bool:
        """Returns whether a later step has consumed this state."""
        return self._generation is not None and self._generation.consumed is not None

    def check(self) -> None:
        """Raises BadInput if a later step has consumed this state."""
        if self._generation is not None and self._generation.consumed is not None:
            raise consumed(self.name, self._generation.consumed)

    def fetch(self) -> Array:
        """Returns the whole array: numpy, or a typed PRNG key. Raises BadInput once it is stale."""
        self.check()
        if self._pending is None:
            waits = [self.session.fetcher(stage, [buffer])() for stage, buffer in self.home.pieces]
            return assemble([wait()[0] for wait in waits], self.dtype)
        return assemble([x for wait in self._pending for x in wait()], self.dtype)

    def block_until_ready(self) -> DistributedArray:
        """Waits until the step that makes it has run; returns the array itself."""
        self.fetch()
        return self

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = self.fetch()
        if is_key(self.dtype):
            raise TypeError(
                f"{self.name} is a typed PRNG key, which numpy has no type for; use jax.random.key_data"
            )
        return np.array(whole, dtype=dtype, copy=copy)

    def __float__(self) -> float:
        return float(np.asarray(self))

    def __int__(self) -> int:
        return int(np.asarray(self))

    def item(self) -> Any:
        """Returns the single element as a Python number."""
        return np.asarray(self).item()

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index]

    def __reduce__(self) -> Any:
        return np.asarray, (np.asarray(self),)

    def __format__(self, spec: str) -> str:
        return format(np.asarray(self)[()], spec)

    def __repr__(self) -> str:
        where = ", ".join(dict.fromkeys(f"stage {stage}" for stage, _ in self.home.pieces))
        stale = " (consumed)" if self.is_deleted() else ""
        return f"DistributedArray({self.name or 'result'}, {self.dtype}{list(self.shape)} on {where}){stale}"


def consumed(name: str, step: int | None) -> BadInput:
    """Returns the error for state that a step (its number, where known) has already taken."""
    which = "a later step" if step is None else f"step {step}"
    return BadInput(
        f"{name}: this state was consumed by {which}; use the state that step returned "
        "(to keep an old state, copy it first: autopar.runtime.fetch(state))"
    )


def assemble(pieces: Sequence[Array], dtype: Any) -> Array:
    """Returns one host array from its pieces along dim 0; key data becomes a typed key again."""
    if is_key(dtype):
        data = jax.numpy.asarray(_whole([_data(x) for x in pieces]))
        return jax.random.wrap_key_data(data, impl=dtype._impl.name)
    return _whole([np.asarray(x) for x in pieces])


def _whole(pieces: list[np.ndarray]) -> np.ndarray:
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _data(x: Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(x) if is_key(x.dtype) else x)


def fetch(tree: Any) -> Any:
    """Returns the tree with every array on the host: numpy, or a one-device `jax.Array` of a typed PRNG key.

    All leaves of one stage travel together. Leaves that are no arrays stay as they are.

    Raises:
        BadInput: state that a later step has consumed.
    """
    leaves, structure = jax.tree.flatten(tree)
    asked: dict[tuple[int, int], list[Buffer]] = {}
    sessions: dict[int, Session] = {}
    for leaf in leaves:
        if isinstance(leaf, DistributedArray) and leaf.deferred:
            leaf.check()
            sessions[id(leaf.session)] = leaf.session
            for stage, buffer in leaf.home.pieces:
                asked.setdefault((id(leaf.session), stage), []).append(buffer)
    waits = {key: sessions[key[0]].fetcher(key[1], buffers)() for key, buffers in asked.items()}
    got = {(*key, b): x for key, wait in waits.items() for b, x in zip(asked[key], wait())}

    def host(leaf: Any) -> Any:
        if isinstance(leaf, DistributedArray) and leaf.deferred:
            return assemble([got[id(leaf.session), s, b] for s, b in leaf.home.pieces], leaf.dtype)
        if isinstance(leaf, DistributedArray):
            return leaf.fetch()
        if isinstance(leaf, jax.Array):
            return assemble([leaf], leaf.dtype)
        return leaf

    return jax.tree.unflatten(structure, [host(leaf) for leaf in leaves])
