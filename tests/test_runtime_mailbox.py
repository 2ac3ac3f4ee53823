"""The mailbox: what is sent arrives as it was; what fails is heard of at once by everyone who waits."""

import contextlib
import secrets
import socket
import struct
import threading
import time

import ml_dtypes
import numpy as np
import pytest

from autopar.runtime.ray_backend.mailbox import Mailbox, PeerFailed

SECRET = secrets.token_bytes(32)
SOON = 10.0
"""Seconds that a test waits for what should come at once."""


@contextlib.contextmanager
def mailboxes(count, *, secret=SECRET):
    made = [Mailbox("127.0.0.1", f"stage {k}", secret) for k in range(count)]
    try:
        yield made
    finally:
        for each in made:
            each.close()


ARRAYS = [
    np.arange(12, dtype=np.float32).reshape(3, 4),
    np.array(3, np.int64),
    np.float32(2.5),
    np.zeros((0, 5), np.float16),
    np.array([True, False]),
    np.arange(6).reshape(2, 3).T,  # not contiguous
    np.arange(24.0).reshape(2, 3, 4)[:, 1:, ::2],
    np.array([1.5, -2], ml_dtypes.bfloat16),
    np.array([1.5, -2], ml_dtypes.float8_e4m3fn),
    np.array([1, -3], ml_dtypes.int4),
    np.array([1 + 2j], np.complex64),
]


def test_arrays_arrive_as_they_were():
    with mailboxes(2) as (a, b):
        a.send(b.address, "all", ARRAYS)
        found = b.recv("all", SOON)
    for got, want in zip(found, ARRAYS, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_array_equal(got, want)


def test_tags_are_told_apart_in_any_order():
    with mailboxes(3) as (a, b, c):
        for sender, name in ((a, "a"), (c, "c")):
            for step in range(3):
                sender.send(b.address, f"{step}:{name}", [np.array(step)])
        for step in (2, 0, 1):
            for name in "ca":
                assert b.recv(f"{step}:{name}", SOON)[0] == step


def test_both_ways_and_an_empty_message():
    with mailboxes(2) as (a, b):
        a.send(b.address, "there", [])
        b.send(a.address, "back", [])
        assert b.recv("there", SOON) == a.recv("back", SOON) == []


def test_a_send_does_not_wait_for_the_receiver():
    with mailboxes(1) as (a,), socket.create_server(("127.0.0.1", 0)) as deaf:
        big = np.zeros(1 << 24, np.uint8)
        begun = time.monotonic()
        for k in range(4):  # more than any socket's buffer holds, to someone who never reads
            a.send(deaf.getsockname(), str(k), [big])
        assert time.monotonic() - begun < SOON / 2
        deaf.accept()[0].close()


def test_a_receive_has_a_deadline():
    with (
        mailboxes(1) as (a,),
        pytest.raises(PeerFailed, match=r"no message '7:x' from stage 3 within 0.05 s"),
    ):
        a.recv("7:x", 0.05, "stage 3")


def wait_for_failure(mailbox):
    begun = time.monotonic()
    with pytest.raises(PeerFailed) as caught:
        mailbox.recv("never", 2 * SOON)
    assert time.monotonic() - begun < SOON
    return str(caught.value)


def test_an_abort_is_heard_by_all():
    with mailboxes(3) as (a, b, c):
        a.abort([b.address, c.address], "ValueError: a broken segment")
        for each in (b, c):
            assert wait_for_failure(each) == "stage 0 gave up: ValueError: a broken segment"
        assert b.failure is not None  # and stays


def test_what_came_before_an_abort_can_still_be_received():
    with mailboxes(2) as (a, b):
        a.send(b.address, "last", [np.array(1)])
        a.abort([b.address], "why")
        wait_for_failure(b)
        assert b.recv("last", SOON)[0] == 1


def test_a_goodbye_is_no_failure():
    with mailboxes(2) as (a, b):
        a.send(b.address, "x", [])
        b.recv("x", SOON)
        a.close()
        with pytest.raises(PeerFailed, match="no message"):
            b.recv("y", 0.2)


def test_a_peer_that_cannot_be_reached():
    with mailboxes(1) as (a,):
        with socket.create_server(("127.0.0.1", 0)) as gone:
            address = gone.getsockname()
        a.send(address, "x", [np.zeros(3)])
        assert f"cannot send to 127.0.0.1:{address[1]}" in wait_for_failure(a)


@contextlib.contextmanager
def through(target):
    """An address whose connections are passed on to `target`, and a function that cuts them."""
    links = []

    def pump(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)

    def accept():
        with contextlib.suppress(OSError):
            links.extend((door.accept()[0], socket.create_connection(target)))
            for pair in (links, links[::-1]):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    def cut():
        for link in links:
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)

    with socket.create_server(("127.0.0.1", 0)) as door:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield door.getsockname(), cut
        cut()
        thread.join(SOON)
        for link in links:
            link.close()


def test_a_peer_that_dies_is_heard_of():
    with mailboxes(2) as (a, b), through(b.address) as (door, cut):
        a.send(door, "x", [np.arange(3)])
        assert b.recv("x", SOON)[0].tolist() == [0, 1, 2]
        cut()
        assert wait_for_failure(b).startswith("stage 0 is gone")


def test_a_wrong_secret_is_not_let_in():
    with mailboxes(1) as (a,), mailboxes(1, secret=secrets.token_bytes(32)) as (stranger,):
        stranger.send(a.address, "x", [np.zeros(3)])
        assert "cannot send" in wait_for_failure(stranger)
        with pytest.raises(PeerFailed, match="no message"):
            a.recv("x", 0.2)
        assert a.failure is None  # a stranger fails nothing of ours


def test_noise_on_the_port_fails_nothing():
    with mailboxes(2) as (a, b):
        with socket.create_connection(a.address) as noise:
            noise.recv(32)
            noise.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
            with contextlib.suppress(ConnectionError):
                assert noise.recv(1) == b""  # hung up on
        b.send(a.address, "x", [])
        assert a.recv("x", SOON) == []


def test_a_sender_finds_out_a_false_receiver():
    with mailboxes(1) as (a,), socket.create_server(("127.0.0.1", 0)) as false:
        a.send(false.getsockname(), "x", [np.zeros(3)])
        with false.accept()[0] as link:
            link.sendall(bytes(32))
            told = link.recv(64)
            link.sendall(bytes(32))  # no proof
            assert SECRET not in told
            assert "does not know the session's secret" in wait_for_failure(a)


def test_a_broken_header_fails_the_peer(monkeypatch):
    from autopar.runtime.ray_backend import mailbox

    packed = mailbox._packed
    with mailboxes(2) as (a, b):
        monkeypatch.setattr(
            mailbox, "_packed", lambda h: struct.pack("<I", 1 << 30) if "tag" in h else packed(h)
        )
        a.send(b.address, "x", [])
        assert wait_for_failure(b) == f"stage 0 is gone (a header of {1 << 30} bytes)"
