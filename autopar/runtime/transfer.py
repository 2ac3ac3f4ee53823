"""Moves arrays onto a mesh: copies of a caller's arrays, and buffers that cross from one stage to another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from autopar.core.dtypes import itemsize
from autopar.core.errors import ProgramError
from autopar.core.program import Buffer, Recv, Send, Slot
from autopar.runtime import kernels
from autopar.runtime.reshard import carrier

Array = Any


def own(arrays: Sequence[Array], shardings: Sequence[jax.sharding.Sharding], donate: bool) -> list[Array]:
    """Returns copies in these layouts that share no memory with the arrays given (unless `donate`).

    `device_put(…, may_alias=False)` alone does not promise that: where the layout changes but one device
    keeps the same tile, the tile is shared, and donating the result would delete the caller's array.
    """
    placed = jax.device_put(list(arrays), list(shardings), donate=donate, may_alias=None if donate else False)
    if donate:
        return placed
    shared = [i for i, x in enumerate(arrays) if _may_share(x, shardings[i])]
    for i, copy in zip(shared, _copy([placed[i] for i in shared])):
        placed[i] = copy
    return placed


def share(arrays: Sequence[Array], shardings: Sequence[jax.sharding.Sharding]) -> list[Array]:
    """Returns the arrays in these layouts, possibly the arrays themselves: never donate them."""
    return jax.device_put(list(arrays), list(shardings))


def _may_share(x: Array, sharding: jax.sharding.Sharding) -> bool:
    if not isinstance(x, jax.Array) or x.sharding.is_equivalent_to(sharding, x.ndim):
        return False
    return bool(x.sharding.device_set & sharding.device_set)


def _copy(arrays: list[Array]) -> list[Array]:
    return [jax.jit(jnp.copy, out_shardings=x.sharding)(x) for x in arrays]


class LocalTransport:
    """Carries messages between stages of one process: `device_put` at the send, handed over at the receive.

    Args:
        slots: per stage, value id → how it is kept there.
        sharding: (stage, buffer) → where it lies there.
    """

    def __init__(
        self,
        slots: Sequence[dict[int, Slot]],
        sharding: Callable[[int, Buffer], jax.sharding.NamedSharding],
    ):
        self._slots, self._sharding = slots, sharding
        self._routes: dict[tuple[int, str], Callable[[Sequence[Array]], list[Array]]] = {}
        self._box: dict[tuple[int, str], list[Array]] = {}
        self._arrived, self._failed = threading.Condition(), False
        self.patience: float | None = None
        """Seconds a receive waits; None: not at all. Measured steps, with a thread per stage, set it."""

    def send(self, instruction: Send, arrays: Sequence[Array]) -> None:
        route = self._routes.get((instruction.to, instruction.tag))
        if route is None:
            route = self._route(instruction, arrays)
            self._routes[instruction.to, instruction.tag] = route
        moved = route(arrays)
        if self.patience is None:
            self._box[instruction.to, instruction.tag] = moved
            return
        jax.block_until_ready(moved)
        with self._arrived:
            self._box[instruction.to, instruction.tag] = moved
            self._arrived.notify_all()

    def post(self, stage: int) -> _Mailbox:
        """Returns the transport as one stage sees it."""
        return _Mailbox(self, stage)

    def take(self, stage: int, tag: str) -> list[Array] | None:
        """Returns a message, waiting up to `patience` seconds for it; None when it is not there."""
        if self.patience is None:
            return self._box.pop((stage, tag), None)
        with self._arrived:
            there = self._arrived.wait_for(lambda: (stage, tag) in self._box or self._failed, self.patience)
            if not there or self._failed:
                raise ProgramError(f"stage {stage} got no message {tag!r} within {self.patience:g} s")
            return self._box.pop((stage, tag))

    def fail(self) -> None:
        """Wakes every stage that waits: a peer has failed."""
        with self._arrived:
            self._failed = True
            self._arrived.notify_all()

    def clear(self) -> None:
        """Drops messages under way."""
        self._box.clear()
        self._failed = False

    def _route(self, send: Send, arrays: Sequence[Array]) -> Callable[[Sequence[Array]], list[Array]]:
        """Casts on whichever side makes the message smaller, and moves."""
        layouts = [self._sharding(send.to, buffer) for buffer in send.buffers]
        kept = [self._slots[send.to][buffer.value].dtype for buffer in send.buffers]
        came = [str(x.dtype) for x in arrays]
        narrow = tuple(k if itemsize(k) < itemsize(c) else c for k, c in zip(kept, came))
        before = kernels.cast(narrow, tuple(x.sharding for x in arrays)) if list(narrow) != came else _same
        carry = carrier(arrays, layouts)
        after = kernels.cast(tuple(kept), tuple(layouts)) if list(narrow) != kept else _same
        return lambda arrays: after(carry(before(arrays)))


def _same(arrays: Sequence[Array]) -> list[Array]:
    return list(arrays)


class _Mailbox:
    """One stage's end of a LocalTransport."""

    def __init__(self, transport: LocalTransport, stage: int):
        self._transport, self._stage = transport, stage
        self.send = transport.send

    def recv(self, instruction: Recv) -> list[Array] | None:
        return self._transport.take(self._stage, instruction.tag)
