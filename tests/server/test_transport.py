"""server.http.transport alone: bytes that arrive in any pieces, and a clock that the test turns."""

import socket
from types import SimpleNamespace

import pytest

from server.errors import ApiError
from server.http import HttpLimits, transport
from server.http.transport import ClientGoneError, Transport

KIB = 1024


@pytest.fixture
def peer():
    """The other end of `ours`."""
    listener = socket.create_server(("127.0.0.1", 0))
    with listener, socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 * KIB)
        peer.connect(listener.getsockname())
        yield SimpleNamespace(socket=peer, listener=listener)


@pytest.fixture
def ours(peer):
    client, _ = peer.listener.accept()
    with client:
        yield Transport(client, HttpLimits(stall_seconds=10.0))


# ---- in --------------------------------------------------------------------------------------------------


def feed(ours, *pieces):
    """Let these arrive, one at a time, then nothing."""
    left = list(pieces)

    def receive(deadline):
        if left:
            ours._received += left.pop(0)
            return True
        return False

    ours._received.clear()
    ours._receive = receive


HEAD = b"GET / HTTP/1.1\r\nHost: a\r\nX: y"


@pytest.mark.parametrize("before", [b"", b"\r\n", b"\r\n\r\n"])
def test_a_head_may_be_divided_anywhere(ours, before):
    whole = before + HEAD + b"\r\n\r\n"
    for first in range(1, len(whole)):
        for second in range(first, min(first + 5, len(whole))):
            pieces = [whole[:first], whole[first:second], whole[second:] + b"next"]
            feed(ours, *filter(None, pieces))
            assert ours.read_head() == HEAD
            assert ours._received == b"next"


@pytest.mark.parametrize("line_end", [b"\n", b"\r", b"\r\r\n", b"\n\r\n"])
def test_a_wrong_line_end_is_refused_as_soon_as_it_is_there(ours, line_end):
    """Or a client that ends its lines otherwise would wait for the deadline."""
    begun = b"GET / HTTP/1.1" + line_end + b"H"
    for first in range(1, len(begun)):
        feed(ours, begun[:first], begun[first:])  # and nothing more
        with pytest.raises(ApiError) as caught:
            ours.read_head()
        assert caught.value.status == 400


def test_a_body_in_chunks_may_be_divided_anywhere(ours):
    whole = b"3;x=y\r\nabc\r\n10\r\n0123456789abcdef\r\n0\r\nX: y\r\n\r\n"
    for first in range(1, len(whole)):
        feed(ours, whole[:first], whole[first:] + b"next")
        assert ours.read_body(None) == b"abc0123456789abcdef"
        assert ours._received == b"next"


# ---- out -------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(transport, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def fill(ours):
    """Write until something has to wait."""
    while not ours.has_pending:
        ours.write(b"x" * KIB)


def test_a_reader_is_slow_not_stalled_as_long_as_it_takes_something(ours, peer, clock):
    fill(ours)
    ours.write(b"x" * 200 * KIB)
    for _ in range(5):
        clock.now += 9
        left = len(ours._pending)
        while len(ours._pending) == left:
            peer.socket.recv(4 * KIB)
            ours.write(b"")
    assert ours.has_pending
    clock.now += 9
    ours.write(b"")
    clock.now += 2
    with pytest.raises(ClientGoneError, match="stopped reading"):
        ours.write(b"")


def test_whoever_has_nothing_to_take_does_not_stall(ours, clock):
    ours.write(b"x")
    clock.now += 1000
    fill(ours)
    clock.now += 9
    ours.write(b"x")


def test_nothing_stalls_before_it_has_waited(ours, clock):
    fill(ours)
    ours._pending.clear()  # the last of it has just found room, and nothing more does
    clock.now += 1000
    ours.write(b"x")
    clock.now += 11
    with pytest.raises(ClientGoneError, match="stopped reading"):
        ours.write(b"x")


def test_what_waits_has_a_bound(ours):
    fill(ours)
    ours.write(b"x" * (256 * KIB - len(ours._pending)))
    with pytest.raises(ClientGoneError, match="too slowly"):
        ours.write(b"x")


def test_whoever_has_gone_is_told_from_who_is_slow(ours, peer):
    peer.socket.close()
    with pytest.raises(ClientGoneError):
        while True:
            ours.write(b"x" * KIB)
            ours.flush()
