"""Messages between workers over TCP: tagged arrays, buffered sends, receives with a deadline, aborts.

A connection starts with the session's secret. A message is a length, a JSON header and the arrays'
bytes; nothing is
unpickled. Whatever goes wrong on a connection (a peer that dies, an abort, a broken header) fails every
receive of the
same generation, so that no worker waits for one that is gone.
"""

from __future__ import annotations

import hmac
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and the float8 types with numpy)
import numpy as np

from autopar.core.errors import BackendError

Address = tuple[str, int]
_LENGTH = struct.Struct("<I")
_LONGEST_HEADER = 1 << 24
_SECRET_BYTES = 32
_CONNECT_SECONDS = 5.0


class PeerFailed(BackendError):
    """Another worker of the session has failed, or could not be heard of in time."""


class Mailbox:
    """One worker's end: a listening socket, a thread per peer, and the messages that have arrived.

    Args:
        host: the address to listen on; other workers reach it there.
        name: who this is, in other workers' messages ("stage 1").
        secret: 32 bytes that all workers of the session share.
    """

    def __init__(self, host: str, name: str, secret: bytes):
        assert len(secret) == _SECRET_BYTES
        self.name, self._secret, self.generation = name, secret, 0
        self._arrived = threading.Condition()
        self._messages: dict[tuple[int, str], list[np.ndarray[Any, Any]]] = {}
        self._failures: dict[int, str] = {}
        self._peers: dict[Address, _Outbox] = {}
        self._closed = False
        self._listener = socket.create_server((host, 0))
        self.address: Address = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True, name="mailbox").start()

    # sending

    def send(self, to: Address, tag: str, arrays: Sequence[np.ndarray[Any, Any]]) -> None:
        """Queues a message and returns at once. The arrays must not be changed afterwards."""
        header = {
            "tag": tag,
            "generation": self.generation,
            "from": self.name,
            "arrays": [_form(a) for a in arrays],
        }
        self._outbox(to).put(header, arrays)

    def abort(self, peers: Sequence[Address], why: str) -> None:
        """Tells the peers that this worker gives up; their receives then fail with `why`."""
        for to in peers:
            self._outbox(to).put({"abort": why, "generation": self.generation, "from": self.name}, ())

    def _outbox(self, to: Address) -> _Outbox:
        if to not in self._peers:
            hello = self._secret + _packed({"from": self.name, "generation": self.generation})
            self._peers[to] = _Outbox(to, hello, self._fail)
        return self._peers[to]

    # receiving

    def recv(self, tag: str, seconds: float) -> list[np.ndarray[Any, Any]]:
        """Returns the arrays of a message, waiting for it.

        Raises:
            PeerFailed: it did not come within `seconds`, or a peer has failed meanwhile.
        """
        key = (self.generation, tag)
        with self._arrived:
            self._arrived.wait_for(lambda: key in self._messages or self.failure is not None, seconds)
            if key in self._messages:
                return self._messages.pop(key)
            raise PeerFailed(self.failure or f"no message {tag!r} came within {seconds:g} s")

    @property
    def failure(self) -> str | None:
        """What has gone wrong in this generation, in words."""
        return self._failures.get(self.generation)

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="mailbox peer").start()

    def _serve(self, connection: socket.socket) -> None:
        who, generation = "a worker", self.generation
        with connection:
            connection.settimeout(_CONNECT_SECONDS)
            try:
                if not hmac.compare_digest(bytes(_exactly(connection, _SECRET_BYTES)), self._secret):
                    return  # not one of ours: it is not told why, and nothing of ours fails
                hello = _header(connection)
                who, generation = hello["from"], hello["generation"]
                connection.settimeout(None)
                while True:
                    self._take(connection, _header(connection))
            except _Goodbye:
                return
            except (OSError, ValueError, KeyError, TypeError) as error:
                if not self._closed:
                    self._fail(generation, f"{who} is gone ({error or type(error).__name__})")

    def _take(self, connection: socket.socket, header: dict[str, Any]) -> None:
        if header.get("goodbye"):
            raise _Goodbye
        if "abort" in header:
            self._fail(header["generation"], f"{header['from']} gave up: {header['abort']}")
            return
        arrays = [_read_array(connection, form) for form in header["arrays"]]
        with self._arrived:
            self._messages[header["generation"], header["tag"]] = arrays
            self._arrived.notify_all()

    def _fail(self, generation: int, why: str) -> None:
        with self._arrived:
            self._failures.setdefault(generation, why)
            self._arrived.notify_all()

    # life

    def restart(self, generation: int) -> None:
        """Forgets messages and failures, and begins another generation."""
        with self._arrived:
            self.generation = generation
            self._messages.clear()
            self._failures = {g: why for g, why in self._failures.items() if g >= generation}

    def close(self) -> None:
        """Says goodbye to the peers and stops listening."""
        self._closed = True
        for outbox in self._peers.values():
            outbox.close()
        self._listener.close()


class _Goodbye(Exception):
    """The peer closes on purpose."""


class _Outbox:
    """What is still to be sent to one peer, and the thread that sends it."""

    def __init__(self, to: Address, hello: bytes, fail: Any):
        self._to, self._hello, self._fail = to, hello, fail
        self._queue: queue.Queue[tuple[dict[str, Any], Sequence[np.ndarray[Any, Any]]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="outbox")
        self._thread.start()

    def put(self, header: dict[str, Any], arrays: Sequence[np.ndarray[Any, Any]]) -> None:
        self._queue.put((header, arrays))

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(timeout=_CONNECT_SECONDS)

    def _run(self) -> None:
        generation = 0
        try:
            with socket.create_connection(self._to, timeout=_CONNECT_SECONDS) as connection:
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(self._hello)
                while (item := self._queue.get()) is not None:
                    header, arrays = item
                    generation = header["generation"]
                    connection.sendall(_packed(header))
                    for array in arrays:
                        if array.nbytes:
                            connection.sendall(
                                memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
                            )
                connection.sendall(_packed({"goodbye": True}))
        except OSError as error:
            self._fail(generation, f"cannot reach {self._to[0]}:{self._to[1]} ({error})")


def _form(array: np.ndarray[Any, Any]) -> tuple[str, tuple[int, ...]]:
    return array.dtype.name, array.shape


def _packed(header: dict[str, Any]) -> bytes:
    data = json.dumps(header).encode()
    return _LENGTH.pack(len(data)) + data


def _header(connection: socket.socket) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(bytes(_exactly(connection, _LENGTH.size)))
    if length > _LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    return json.loads(bytes(_exactly(connection, length)))


def _read_array(connection: socket.socket, form: Sequence[Any]) -> np.ndarray[Any, Any]:
    dtype, shape = np.dtype(form[0]), tuple(form[1])
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.frombuffer(_exactly(connection, count), np.uint8).view(dtype).reshape(shape)


def _exactly(connection: socket.socket, count: int) -> bytearray:
    """Returns the next `count` bytes."""
    data = bytearray(count)
    view, done = memoryview(data), 0
    while done < count:
        received = connection.recv_into(view[done:])
        if not received:
            raise ConnectionError("the connection was closed")
        done += received
    return data


def wait_until(done: Any, seconds: float, every: float = 0.001) -> bool:
    """Returns whether `done()` became true within `seconds`."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True
