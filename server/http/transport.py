"""Bytes from and to one client. Every wait has an end."""

import re
import select
import socket
import time

from server.errors import ApiError
from server.http import HttpLimits
from server.http.head import parse_field, refuse_bare_line_ends

_READ_SIZE = 64 * 1024
_MAX_CHUNK_LINE = 256  # size and extensions of a chunk
_MAX_TRAILER = 8 * 1024
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})(?:[ \t]*;[^\x00-\x08\x0a-\x1f\x7f]*)?")


class ClientGoneError(Exception):
    """The client has closed, reads too slowly, or is to be left: there is nobody to answer."""


class Transport:
    """A connected socket, read and written with deadlines. For one thread. limits: what its client may cost."""

    def __init__(self, client: socket.socket, limits: HttpLimits):
        client.setblocking(False)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, limits.pending // 4)  # the rest waits here
        self.socket = client
        self.limits = limits
        self._received = bytearray()
        self._pending = bytearray()
        self._taken_at = time.monotonic()  # when the client last took something that had been waiting
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(client, select.POLLIN)
        self._writable.register(client, select.POLLOUT)

    # ---- in ----------------------------------------------------------------------------------------------

    def read_head(self) -> bytes | None:
        """The next request's head, without the empty line after it; None if there is no next request.

        Raises ApiError: 400 for wrong line ends, 408, 431; ClientGoneError if the client goes in its midst.
        """
        limits = self.limits
        if not self._received and not self._receive(time.monotonic() + limits.idle_seconds):
            return None
        deadline = time.monotonic() + limits.head_seconds
        looked = 0  # so far no line end was wrong
        while True:
            while self._received.startswith(b"\r\n"):  # RFC 9112, 2.2: line ends before a request are let pass
                del self._received[:2]
            end = self._received.find(b"\r\n\r\n", max(looked - 3, 0))
            size = len(self._received) if end < 0 else end
            refuse_bare_line_ends(self._received, max(looked - 1, 0), size)
            if size > limits.head:
                raise ApiError(431, f"the request's head is larger than {limits.head} bytes",
                               code="headers_too_large")
            if end >= 0:
                return self._take(end + 4)[:-4]
            looked = size
            if not self._receive(deadline):
                if time.monotonic() < deadline or not self._received:
                    raise ClientGoneError
                raise ApiError(408, "the request's head came too slowly", code="timeout")

    def read_body(self, length: int | None) -> bytes:
        """A body of that length; None: one in chunks. Raises ApiError(400, 408, 413), ClientGoneError."""
        deadline = time.monotonic() + self.limits.body_seconds
        if length is None:
            return self._read_chunks(deadline)
        self._refuse_large(length)
        return self._read_exactly(length, deadline)

    def _read_chunks(self, deadline: float) -> bytes:
        body = bytearray()
        while True:
            match = _CHUNK_LINE.fullmatch(self._read_line(_MAX_CHUNK_LINE, deadline))
            if match is None:
                raise ApiError(400, "a chunk of the body does not begin with its size", code="malformed_http")
            size = int(match[1], 16)
            if size == 0:
                break
            self._refuse_large(len(body) + size)
            chunk = self._read_exactly(size + 2, deadline)
            if not chunk.endswith(b"\r\n"):
                raise ApiError(400, "a chunk of the body is longer than its size says", code="malformed_http")
            body += chunk[:-2]
        left = _MAX_TRAILER
        while line := self._read_line(left, deadline):
            parse_field(line)  # fields after the body mean nothing here, but must be some
            left -= len(line)
        return bytes(body)

    def discard(self, length: int) -> None:
        """Read what nobody wants, so that the next request can be found. Raises as `read_body`."""
        self._read_exactly(length, time.monotonic() + self.limits.head_seconds)

    def _refuse_large(self, length: int) -> None:
        if length > self.limits.body:
            raise ApiError(413, f"the body is larger than {self.limits.body} bytes", code="body_too_large")

    def _read_exactly(self, length: int, deadline: float) -> bytes:
        while len(self._received) < length:
            self._receive_body(deadline)
        return self._take(length)

    def _read_line(self, limit: int, deadline: float) -> bytes:
        while (end := self._received.find(b"\r\n")) < 0:
            refuse_bare_line_ends(self._received, 0, len(self._received))
            if len(self._received) > limit:
                raise ApiError(400, "a line within the body is too long", code="malformed_http")
            self._receive_body(deadline)
        if end > limit:
            raise ApiError(400, "a line within the body is too long", code="malformed_http")
        return self._take(end + 2)[:-2]

    def _receive_body(self, deadline: float) -> None:
        if not self._receive(deadline):
            if time.monotonic() < deadline:
                raise ClientGoneError
            raise ApiError(408, "the body came too slowly", code="timeout")

    def _receive(self, deadline: float) -> bool:
        """Wait for bytes. False if none came in time, or none will come."""
        if not self._readable.poll(max(deadline - time.monotonic(), 0) * 1000):
            return False
        try:
            data = self.socket.recv(_READ_SIZE)
        except BlockingIOError:
            return True  # it was a false alarm: ask again
        except OSError:
            return False
        self._received += data
        return bool(data)

    def _take(self, length: int) -> bytes:
        taken = bytes(self._received[:length])
        del self._received[:length]
        return taken

    # ---- out ---------------------------------------------------------------------------------------------

    @property
    def has_pending(self) -> bool:
        """Whether bytes wait for the client to read."""
        return bool(self._pending)

    def keep(self, data: bytes) -> None:
        """Have it sent with what comes next: by the next `write` or `flush`."""
        if not self._pending:
            self._taken_at = time.monotonic()
        self._pending += data

    def write(self, data: bytes) -> None:
        """Send without waiting; what the client does not take yet is kept for `write` and `flush` to send.

        What alone is more than limits.pending is waited for as by `flush`. Raises ClientGoneError if the client
        has gone, leaves more than limits.pending, or for stall_seconds everything, untaken.
        """
        self.keep(data)
        self._send()
        if len(data) > self.limits.pending:
            self.flush()
        elif len(self._pending) > self.limits.pending:
            raise ClientGoneError("it reads too slowly")
        elif self._pending and time.monotonic() - self._taken_at > self.limits.stall_seconds:
            raise ClientGoneError("it has stopped reading")

    def flush(self) -> None:
        """Wait until the system has taken everything. Raises ClientGoneError after stall_seconds of nothing."""
        while self._pending:
            if not self._writable.poll(self.limits.stall_seconds * 1000):
                raise ClientGoneError("it has stopped reading")
            self._send()

    def send(self, *parts: bytes) -> None:
        """Send all, waiting. Raises ClientGoneError."""
        for part in parts:
            self._pending += part
        self.flush()

    def _send(self) -> None:
        try:
            while self._pending:
                del self._pending[:self.socket.send(self._pending)]
                self._taken_at = time.monotonic()
        except BlockingIOError:
            pass
        except OSError as error:
            raise ClientGoneError(str(error)) from None

    def close(self, linger_seconds: float = 1.0) -> None:
        """Close so that a client which is still sending gets to read what was answered.

        A socket closed with unread bytes resets the connection, and the answer may be lost with it.
        """
        deadline, discarded = time.monotonic() + linger_seconds, 0
        try:
            self.socket.shutdown(socket.SHUT_WR)
            while discarded < self.limits.body and self._receive(deadline):
                discarded += len(self._received)
                self._received.clear()
        except OSError:
            pass
        finally:
            self.socket.close()
