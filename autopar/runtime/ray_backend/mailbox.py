"""Messages between workers over TCP: tagged arrays, buffered sends, receives with a deadline, aborts.

Both ends of a connection first prove that they know the session's secret. A message is a length, a JSON
header and the arrays' bytes; nothing is unpickled. Whatever goes wrong on a connection (a peer that dies, an
abort, a broken header) fails every receive from then on, so that no worker waits for one that is gone. A
mailbox that has failed stays so: the next session has new mailboxes and another secret, so nothing of this
one reaches it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import queue
import secrets
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and the float8 types with numpy)
import numpy as np

from autopar.core.errors import BackendError

Address = tuple[str, int]
Host = np.ndarray[Any, Any]
_LENGTH = struct.Struct("<I")
_LONGEST_HEADER = 1 << 24
_PROOF = 32
"""Bytes of a nonce, and of a proof."""
_CONNECT_SECONDS = 20.0
_CLOSE_SECONDS = 2.0
_GOODBYE: dict[str, Any] = {"goodbye": True}


class PeerFailed(BackendError):
    """Another worker of the session has failed, or could not be heard of in time."""


class Mailbox:
    """One worker's end: a listening socket, a thread per peer, and the messages that have arrived.

    Args:
        host: the address to listen on; other workers reach it there.
        name: who this is, in other workers' messages ("stage 1").
        secret: random bytes that all workers of the session share, and no one else.

    Attributes:
        address: where others send to: host and port.
        failure: what has gone wrong, in words; None: nothing.
    """

    def __init__(self, host: str, name: str, secret: bytes):
        self.name, self.failure, self._secret = name, None, secret
        self._arrived = threading.Condition()
        self._messages: dict[str, list[Host]] = {}
        self._peers: dict[Address, _Outbox] = {}
        self._closed = False
        self._listener = socket.create_server((host, 0))
        self.address: Address = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, daemon=True, name="mailbox").start()

    # sending

    def send(self, to: Address, tag: str, arrays: Sequence[Host]) -> None:
        """Queues a message and returns at once. The arrays must not be changed afterwards."""
        self._outbox(to).put({"tag": tag, "arrays": [(a.dtype.name, a.shape) for a in arrays]}, arrays)

    def abort(self, peers: Sequence[Address], why: str) -> None:
        """Tells the peers that this worker gives up; their receives then fail with `why`."""
        for to in peers:
            self._outbox(to).put({"abort": why})

    def _outbox(self, to: Address) -> _Outbox:
        if to not in self._peers:
            self._peers[to] = _Outbox(to, self.name, self._secret, self._fail)
        return self._peers[to]

    # receiving

    def recv(self, tag: str, seconds: float, sender: str = "a peer") -> list[Host]:
        """Returns the arrays of a message, waiting for it.

        Raises:
            PeerFailed: it did not come within `seconds`, or a peer has failed meanwhile.
        """
        with self._arrived:
            self._arrived.wait_for(lambda: tag in self._messages or self.failure is not None, seconds)
            if tag in self._messages:
                return self._messages.pop(tag)
            raise PeerFailed(self.failure or f"no message {tag!r} from {sender} within {seconds:g} s")

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="inbox").start()

    def _serve(self, connection: socket.socket) -> None:
        with connection:
            try:
                who = _welcome(connection, self._secret)
            except (OSError, ValueError):
                return  # not one of ours: it is not told why, and nothing of ours fails
            try:
                while (header := _header(connection)) != _GOODBYE:
                    self._take(connection, header, who)
            except Exception as error:
                self._fail(f"{who} is gone ({error or type(error).__name__})")

    def _take(self, connection: socket.socket, header: dict[str, Any], who: str) -> None:
        if "abort" in header:
            self._fail(f"{who} gave up: {header['abort']}")
            return
        arrays = [_array(connection, dtype, shape) for dtype, shape in header["arrays"]]
        with self._arrived:
            self._messages[header["tag"]] = arrays
            self._arrived.notify_all()

    def _fail(self, why: str) -> None:
        with self._arrived:
            if not self._closed and self.failure is None:
                self.failure = why
            self._arrived.notify_all()

    def close(self) -> None:
        """Says goodbye to the peers, once everything is sent, and stops listening."""
        self._closed = True
        for outbox in self._peers.values():
            outbox.finish()
        for outbox in self._peers.values():
            outbox.join()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts
        self._listener.close()


class _Outbox:
    """What is still to be sent to one peer, and the thread that sends it."""

    def __init__(self, to: Address, name: str, secret: bytes, fail: Callable[[str], None]):
        self._to, self._name, self._secret, self._fail = to, name, secret, fail
        self._queue: queue.SimpleQueue[tuple[dict[str, Any], Sequence[Host]]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="outbox")
        self._thread.start()

    def put(self, header: dict[str, Any], arrays: Sequence[Host] = ()) -> None:
        self._queue.put((header, arrays))

    def finish(self) -> None:
        self.put(_GOODBYE)

    def join(self) -> None:
        self._thread.join(timeout=_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            with socket.create_connection(self._to, timeout=_CONNECT_SECONDS) as connection:
                _introduce(connection, self._name, self._secret)
                connection.settimeout(None)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                header = None
                while header != _GOODBYE:
                    header, arrays = self._queue.get()
                    connection.sendall(_packed(header))
                    for array in arrays:
                        connection.sendall(_bytes(array))
        except Exception as error:  # the peer sees the connection end without a goodbye
            self._fail(f"cannot send to {self._to[0]}:{self._to[1]} ({error or type(error).__name__})")


# -- proofs: each end answers the other's nonce, so the secret itself never travels


def _welcome(connection: socket.socket, secret: bytes) -> str:
    """Returns who has connected. Raises ValueError or OSError if it isn't one of ours."""
    connection.settimeout(_CONNECT_SECONDS)
    mine = secrets.token_bytes(_PROOF)
    connection.sendall(mine)
    theirs = _exactly(connection, _PROOF)
    if not hmac.compare_digest(_exactly(connection, _PROOF), _proof(secret, b"sender", mine, theirs)):
        raise ValueError("a wrong secret")
    connection.sendall(_proof(secret, b"receiver", mine, theirs))
    who = str(_header(connection)["from"])
    connection.settimeout(None)
    return who


def _introduce(connection: socket.socket, name: str, secret: bytes) -> None:
    theirs, mine = _exactly(connection, _PROOF), secrets.token_bytes(_PROOF)
    connection.sendall(mine + _proof(secret, b"sender", theirs, mine))
    if not hmac.compare_digest(_exactly(connection, _PROOF), _proof(secret, b"receiver", theirs, mine)):
        raise ConnectionError("it does not know the session's secret")
    connection.sendall(_packed({"from": name}))


def _proof(secret: bytes, role: bytes, *nonces: bytes | bytearray) -> bytes:
    return hmac.digest(secret, role + b"".join(nonces), hashlib.sha256)


# -- bytes


def _packed(header: dict[str, Any]) -> bytes:
    data = json.dumps(header).encode()
    return _LENGTH.pack(len(data)) + data


def _header(connection: socket.socket) -> dict[str, Any]:
    (length,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
    if length > _LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    return json.loads(_exactly(connection, length))


def _bytes(array: Host) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _array(connection: socket.socket, dtype: str, shape: Sequence[int]) -> Host:
    form = np.dtype(dtype)
    data = _exactly(connection, math.prod(shape) * form.itemsize)
    return np.frombuffer(data, np.uint8).view(form).reshape(shape)


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
