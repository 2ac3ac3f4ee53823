"""Windows of decode steps: what their rows hold, copied once from the blocks of the cache and kept beside it.

A step of a shape with `window` reads its rows' keys and values as they lie and writes new ones both there and
to the cache; so the cache is complete at any time, and a window can be dropped without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from autopar.api.serving import Loaded, Programs, Shape, state_of
from autopar.core.program import Buffer, Worker
from autopar.runtime.layout import as_dtype

Array = Any


class Window:
    """The window of one step, compiled; the step's session must be of this process.

    Args:
        programs: of the model. shape: of the step.

    Attributes:
        loaded: the step.
    """

    def __init__(self, programs: Programs, shape: Shape):
        self.loaded: Loaded = programs.compiled(shape)
        family: Any = programs.served.family
        self._moves = [
            (stage, pool, window, self._filling(family.rows_of, shape, stage, pool, window))
            for stage, worker in enumerate(self.loaded.program)
            for pool, window in self._pairs(worker)
        ]

    def enter(self, tables: Array, held: Array) -> None:
        """Fills it with what the cache has of the step's rows, in the memory that it had before, if any.

        Args:
            tables: int32 `[rows, blocks]`. held: int32 `[rows]`, tokens that are there.
        """
        session = self.loaded.session
        for stage, pool, window, (fill, refill) in self._moves:
            source, before = (session.fetcher(stage, [buffer])()()[0] for buffer in (pool, window))
            now = fill(source, tables, held) if before is None else refill(before, source, tables, held)
            session.load(stage, {window: now}, donate=True)

    def drop(self) -> None:
        """Frees its memory."""
        session: Any = self.loaded.session
        for stage, _, window, _ in self._moves:
            session.drop(stage, [window])

    def _pairs(self, worker: Worker) -> list[tuple[Buffer, Buffer]]:
        """A stage's buffers of the cache, each with the window's beside it."""
        paths = {Buffer(v): path for path, v in state_of(self.loaded.made.traced)}
        state = {paths[b]: b for b in worker.state if b in paths}
        windows = {path: b for path, b in state.items() if path.startswith("window")}
        return [(state["cache" + path.removeprefix("window")], b) for path, b in windows.items()]

    def _filling(
        self, rows_of: Callable[..., Any], shape: Shape, stage: int, pool: Buffer, window: Buffer
    ) -> tuple[Callable[..., Array], Callable[..., Array]]:
        session: Any = self.loaded.session
        slot = session.slot(stage, pool)
        source = jax.ShapeDtypeStruct(
            slot.shape, as_dtype(slot.dtype), sharding=session.sharding(stage, pool)
        )
        return _filling(rows_of, source, (shape.rows, shape.blocks), session.sharding(stage, window))


@functools.cache
def _filling(
    rows_of: Callable[..., Any], pool: jax.ShapeDtypeStruct, sizes: tuple[int, int], layout: Any
) -> tuple[Callable[..., Array], Callable[..., Array]]:
    """Two compiled functions that make the window of one layer's keys or values; many layers share them.

    Returns:
        `(pool, tables, held) -> window`, and `(window before, pool, tables, held) -> window` in its memory:
        new memory has to be cleared by the system, which takes longer than to fill it.
    """
    everywhere = jax.sharding.NamedSharding(layout.mesh, jax.sharding.PartitionSpec())

    def ints(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=everywhere)

    def refill(before: Array, *args: Array) -> Array:
        return rows_of(*args)

    args = pool, ints(*sizes), ints(sizes[0])
    fill = jax.jit(lambda *args: rows_of(*args), out_shardings=layout).lower(*args)
    window = jax.ShapeDtypeStruct(fill.out_info.shape, fill.out_info.dtype, sharding=layout)
    again = jax.jit(refill, out_shardings=layout, donate_argnums=0, keep_unused=True)
    return fill.compile(), again.lower(window, *args).compile()
