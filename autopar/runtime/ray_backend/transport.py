"""Send and Recv of one worker: tiles leave its devices, travel as boxes, and become arrays in the
receiver's layout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import numpy as np

from autopar.core.dtypes import itemsize
from autopar.core.mesh import Mesh
from autopar.core.program import Buffer, Recv, Send, Slot
from autopar.runtime import layout
from autopar.runtime.ray_backend.mailbox import Address, Mailbox
from autopar.runtime.ray_backend.places import boxes
from autopar.runtime.ray_backend.tiles import Piece, Route, inside, route

Array = Any
Host = np.ndarray[Any, Any]


class TileTransport:
    """Carries messages between stages of different processes.

    Args:
        stage: whose end this is. meshes, slots: of all stages.
        jmesh: this stage's devices.
        mailbox: the wire. addresses: of all stages' mailboxes.
        seconds: how long a receive waits.
    """

    def __init__(
        self,
        stage: int,
        meshes: Sequence[Mesh],
        slots: Sequence[dict[int, Slot]],
        jmesh: jax.sharding.Mesh,
        mailbox: Mailbox,
        addresses: Sequence[Address],
        seconds: float,
    ):
        self._stage, self._meshes, self._slots, self._jmesh = stage, meshes, slots, jmesh
        self._mailbox, self._addresses, self._seconds = mailbox, addresses, seconds
        self._position = {d: i for i, d in enumerate(jmesh.devices.flat)}
        self._route = cache(self._routed)
        self.step = 0

    def send(self, instruction: Send, arrays: Sequence[Array]) -> None:
        """Cuts the arrays into the pieces the receiver wants and queues them."""
        message: list[Host] = []
        for buffer, array in zip(instruction.buffers, arrays, strict=True):
            way = self._route(self._stage, instruction.to, buffer, _shape(array))
            narrow = self._on_the_wire(buffer, self._stage, instruction.to)
            message += self._pieces(way, array, narrow)
        self._mailbox.send(self._addresses[instruction.to], f"{self.step}:{instruction.tag}", message)

    def recv(self, instruction: Recv) -> list[Array]:
        """Waits for the pieces and puts them together on this stage's devices. Raises PeerFailed."""
        pieces = iter(self._mailbox.recv(f"{self.step}:{instruction.tag}", self._seconds))
        return [self._assemble(buffer, instruction.source, pieces) for buffer in instruction.buffers]

    def _on_the_wire(self, buffer: Buffer, source: int, to: int) -> str:
        """The narrower of the two element types."""
        a, b = self._slots[source][buffer.value].dtype, self._slots[to][buffer.value].dtype
        return b if itemsize(b) < itemsize(a) else a

    def _pieces(self, way: Route, array: Array, dtype: str) -> list[Host]:
        held: dict[int, Host] = {}
        data = jax.random.key_data(array) if _is_key(array) else array
        kept = {self._position[s.device]: s.data for s in data.addressable_shards}
        found: list[Host] = []
        for piece in way.pieces:
            if piece.source not in held:
                held[piece.source] = np.asarray(kept[piece.source])
            part = held[piece.source][inside(piece.box, piece.tile)]
            found.append(part if _is_key(array) else part.astype(layout.as_dtype(dtype), copy=False))
        return found

    def _assemble(self, buffer: Buffer, source: int, pieces: Any) -> Array:
        slot = self._slots[self._stage][buffer.value]
        dtype, key = layout.as_dtype(slot.dtype), slot.dtype.startswith("key<")
        shape = slot.shape + (_key_width(slot.dtype),) if key else slot.shape
        way = self._route(source, self._stage, buffer, shape)
        tiles: list[Host | None] = [None] * len(way.targets)
        for piece in way.pieces:
            part = next(pieces)
            tiles[piece.target] = _put(tiles[piece.target], part, piece, way, part.dtype if key else dtype)
        sharding = layout.slot_sharding(self._jmesh, slot)
        if key:
            return jax.device_put(
                jax.random.wrap_key_data(tiles[0], impl=_implementation(slot.dtype)), sharding
            )
        devices = list(self._jmesh.devices.flat)
        placed = {p: (tiles[t], devices[p]) for t, holders in enumerate(way.holders) for p in holders}
        ordered = [placed[p] for p in range(len(devices))]
        arrays = jax.device_put([x for x, _ in ordered], [d for _, d in ordered])
        return jax.make_array_from_single_device_arrays(slot.shape, sharding, arrays)

    def _routed(self, source: int, to: int, buffer: Buffer, shape: tuple[int, ...]) -> Route:
        ends = [boxes(shape, self._slots[s][buffer.value].spec, self._meshes[s]) for s in (source, to)]
        return route(*ends)


def _put(tile: Host | None, part: Host, piece: Piece, way: Route, dtype: Any) -> Host:
    """The tile with one more piece in it; a piece that is the whole tile is not copied."""
    box = way.targets[piece.target]
    if piece.box == box:
        return part.astype(dtype, copy=False)
    if tile is None:
        tile = np.empty([stop - start for start, stop in box], dtype)
    tile[inside(piece.box, box)] = part
    return tile


def _is_key(array: Array) -> bool:
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def _shape(array: Array) -> tuple[int, ...]:
    return jax.eval_shape(jax.random.key_data, array).shape if _is_key(array) else array.shape


def _implementation(dtype: str) -> str:
    return layout.as_dtype(dtype)._impl.name


def _key_width(dtype: str) -> int:
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=_implementation(dtype)))).shape[
        0
    ]
