"""Send and Recv of one worker: tiles leave its devices as boxes and become arrays in another layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import jax
import numpy as np

from autopar.core.dtypes import itemsize
from autopar.core.mesh import Mesh
from autopar.core.program import Buffer, Recv, Send, Slot
from autopar.runtime import layout
from autopar.runtime.ray_backend.mailbox import Address, Host, Mailbox
from autopar.runtime.ray_backend.places import boxes
from autopar.runtime.ray_backend.tiles import Box, Route, extent, inside, route

Array = Any


class TileTransport:
    """Carries messages between stages of different processes.

    A message holds, per buffer, its shape (appended micro-batches are longer than their slot says) and then
    its pieces in the order of their route, which both ends compute alike. A typed PRNG key travels as its
    data.

    Args:
        stage: whose end this is. meshes, slots: of all stages.
        jmesh: this stage's devices.
        mailbox: the wire.
        seconds: how long a receive waits.

    Attributes:
        addresses: of all stages' mailboxes.
        step: number of the step, part of every message's tag.
    """

    def __init__(
        self,
        stage: int,
        meshes: Sequence[Mesh],
        slots: Sequence[dict[int, Slot]],
        jmesh: jax.sharding.Mesh,
        mailbox: Mailbox,
        seconds: float,
    ):
        self._stage, self._meshes, self._slots, self._jmesh = stage, meshes, slots, jmesh
        self._mailbox, self._seconds = mailbox, seconds
        self._devices = list(jmesh.devices.flat)
        self._position = {d: i for i, d in enumerate(self._devices)}
        self._route = cache(self._routed)
        self.addresses: Sequence[Address] = ()
        self.step = 0

    def send(self, instruction: Send, arrays: Sequence[Array]) -> None:
        """Cuts the arrays, once they are computed, into the pieces the receiver wants and queues them."""
        message: list[Host] = []
        for buffer, array in zip(instruction.buffers, arrays, strict=True):
            message += self._pieces(array, buffer.value, instruction.to)
        self._mailbox.send(self.addresses[instruction.to], f"{self.step}:{instruction.tag}", message)

    def recv(self, instruction: Recv) -> list[Array]:
        """Waits for the pieces and puts them together on this stage's devices. Raises PeerFailed."""
        sender = f"stage {instruction.source}"
        pieces = iter(self._mailbox.recv(f"{self.step}:{instruction.tag}", self._seconds, sender))
        return [self._assemble(pieces, buffer, instruction.source) for buffer in instruction.buffers]

    def _pieces(self, array: Array, value: int, to: int) -> Iterator[Host]:
        key = layout.is_key(array.dtype)
        data = jax.random.key_data(array) if key else array
        dtype = data.dtype if key else self._wire(value, to)
        shards = {self._position[shard.device]: shard.data for shard in data.addressable_shards}
        held: dict[int, Host] = {}
        yield np.array(data.shape, np.int64)
        for piece in self._route(self._stage, to, value, data.shape).pieces:
            if piece.source not in held:
                held[piece.source] = np.asarray(shards[piece.source])
                assert held[piece.source].shape == extent(piece.tile), "not in its slot's layout"
            yield held[piece.source][inside(piece.box, piece.tile)].astype(dtype, copy=False)

    def _assemble(self, pieces: Iterator[Host], buffer: Buffer, source: int) -> Array:
        slot = self._slots[self._stage][buffer.value]
        dtype, shape = layout.as_dtype(slot.dtype), tuple(map(int, next(pieces)))
        way = self._route(source, self._stage, buffer.value, shape)
        tiles = _filled(way, pieces, _KEY_DATA if layout.is_key(dtype) else dtype)
        held = {p: tiles[t] for t, holders in enumerate(way.holders) for p in holders}
        parts = jax.device_put([held[p] for p in range(len(self._devices))], self._devices)
        spec = slot.spec + ((),) * (len(shape) - len(slot.spec))
        data = jax.make_array_from_single_device_arrays(shape, layout.named(self._jmesh, spec), parts)
        return wrap_key(data, dtype) if layout.is_key(dtype) else data

    def _wire(self, value: int, to: int) -> Any:
        """The narrower of the element types on the two stages."""
        ours, theirs = (self._slots[s][value].dtype for s in (self._stage, to))
        return layout.as_dtype(theirs if itemsize(theirs) < itemsize(ours) else ours)

    def _routed(self, source: int, to: int, value: int, shape: tuple[int, ...]) -> Route:
        ends = [boxes(shape, self._slots[s][value].spec, self._meshes[s]) for s in (source, to)]
        return route(*ends)


_KEY_DATA = np.dtype(np.uint32)


def wrap_key(data: Array, dtype: Any) -> Array:
    """Returns typed PRNG keys of their data (uint32, one dim more)."""
    return jax.random.wrap_key_data(data, impl=dtype._impl.name)


def _filled(way: Route, pieces: Iterator[Host], dtype: Any) -> list[Host]:
    """The destination's tiles; a piece that is a whole tile is not copied."""
    tiles: list[Host | None] = [None] * len(way.targets)
    for piece in way.pieces:
        part, box = next(pieces), way.targets[piece.target]
        if piece.box == box:
            tiles[piece.target] = part.astype(dtype, copy=False)
            continue
        if (tile := tiles[piece.target]) is None:
            tile = tiles[piece.target] = _empty(box, dtype)
        tile[inside(piece.box, box)] = part
    return [_empty(box, dtype) if tile is None else tile for box, tile in zip(way.targets, tiles)]


def _empty(box: Box, dtype: Any) -> Host:
    return np.empty(extent(box), dtype)
