"""The server process: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from autopar.core.errors import BadInput
from autopar.serve.http.service import Service


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket bound to an address, not yet listening: clients are refused until the model is ready.

    Raises:
        BadInput: the port is in use, or the address is none of this machine's.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise BadInput(f"--host {host!r} is no address: {error.strerror}") from None
    found = socket.socket(family, kind)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise _refused(error, host, port) from None
    return found


def _refused(error: OSError, host: str, port: int) -> BadInput:
    reasons = {
        errno.EADDRINUSE: f"port {port} of {host} is in use; give another with --port (0 picks a free one)",
        errno.EACCES: f"port {port} may only be opened by root; give one above 1023 with --port",
        errno.EADDRNOTAVAIL: f"{host} is no address of this machine; 0.0.0.0 is all of them",
    }
    return BadInput(reasons.get(error.errno or 0, f"cannot open {host}:{port}: {error.strerror}"))


class Server(uvicorn.Server):
    """uvicorn that drains: after SIGTERM or SIGINT nothing new is taken, and what runs may finish in time.

    Args:
        app: from `create_app`. ready: called when requests are taken. A second SIGINT ends it at once.
    """

    def __init__(self, app: FastAPI, ready: Callable[[], None] = lambda: None, log_level: str = "warning"):
        self.service: Service = app.state.service
        drain = self.service.options.drain
        super().__init__(
            uvicorn.Config(
                app,
                log_level=log_level,
                access_log=log_level == "info",
                lifespan="off",
                server_header=False,
                timeout_graceful_shutdown=int(drain) + 5,
                timeout_keep_alive=30,
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.service.draining = True
        deadline = asyncio.create_task(self._stop_late())
        try:
            await super().shutdown(sockets)
        finally:
            deadline.cancel()

    async def _stop_late(self) -> None:
        await asyncio.sleep(self.service.options.drain)
        self.service.stop()


def run(app: FastAPI, listener: socket.socket, ready: Callable[[], None], log_level: str = "warning") -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns.

    Raises:
        BadInput: another process began to listen on the port meanwhile.
    """
    try:
        listener.listen()
    except OSError as error:
        host, port, *_ = listener.getsockname()
        raise _refused(error, host, port) from None
    with _surviving_signals():
        Server(app, ready, log_level).run(sockets=[listener])


@contextlib.contextmanager
def _surviving_signals() -> Iterator[None]:
    """uvicorn raises the signals that stopped it again at its end; an engine is still to be closed then."""

    def nothing(number: int, frame: FrameType | None) -> None:
        pass

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, nothing) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
