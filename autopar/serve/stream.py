"""The answer to one request as it comes: read by blocking iteration or by `async for`."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from autopar.serve.request import Output, Request

_DONE = object()


class Stream:
    """Pieces of a request's answers in the order they are made; iteration ends after the last one.

    One reader at a time. Leaving the iteration early does not cancel the request: call `cancel`.

    Attributes:
        request: what was asked. id: its id.
    """

    def __init__(self, request: Request, cancel: Callable[[], None] = lambda: None):
        self.request = request
        self.id = request.id
        self._cancel = cancel
        self._pieces: queue.SimpleQueue[Output | object] = queue.SimpleQueue()
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._ended = False

    def cancel(self) -> None:
        """Ends the request: its blocks are freed, and its unfinished answers finish as CANCELLED."""
        self._cancel()

    def __iter__(self) -> Iterator[Output]:
        while not self._ended:
            piece = self._pieces.get()
            if isinstance(piece, Output):
                yield piece
            else:
                self._ended = True

    async def __aiter__(self) -> AsyncIterator[Output]:
        event = asyncio.Event()
        self._reader = (asyncio.get_running_loop(), event)
        while not self._ended:
            event.clear()  # before looking: a piece that comes after the look sets it again
            try:
                piece = self._pieces.get_nowait()
            except queue.Empty:
                await event.wait()
                continue
            if isinstance(piece, Output):
                yield piece
            else:
                self._ended = True

    def put(self, piece: Output) -> None:
        """Adds a piece (the engine's side); `wake` makes async readers look."""
        self._pieces.put(piece)

    def end(self) -> None:
        """Ends the stream (the engine's side)."""
        self._pieces.put(_DONE)


def wake(streams: Iterable[Stream]) -> None:
    """Makes the async readers of some streams look again, with one call for each event loop."""
    events: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for stream in streams:
        if stream._reader is not None:
            loop, event = stream._reader
            events.setdefault(loop, []).append(event)
    for loop, waiting in events.items():
        try:
            loop.call_soon_threadsafe(_set_all, waiting)
        except RuntimeError:  # the reader's loop is closed: nobody is left to wake
            continue


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()
