"""One request and its answer: whole, or as server-sent events."""

import http
import time
from collections.abc import Iterable
from email.utils import formatdate

from llama import __version__
from server.errors import ApiError
from server.http.head import Head
from server.http.transport import ClientGoneError, Transport

MAX_DISCARDED = 64 * 1024  # of a body that nobody wants; to read more would cost more than a new connection

Fields = Iterable[tuple[str, str]]


class Exchange:
    """A request whose head has been read. Exactly one of `answer` and `stream` is called, once.

    close_after: the connection ends with this answer. fields: what every answer to this request carries, beside
    what it has of its own. status: of the answer, None before it.
    """

    def __init__(self, transport: Transport, head: Head, peer: str):
        self.head = head
        self.peer = peer
        self.transport = transport
        self.close_after = not head.keeps_alive
        self.fields: list[tuple[str, str]] = []
        self.status: int | None = None
        self._is_body_read = not head.has_body

    def read_body(self) -> bytes:
        """The body; a client that waits for leave to send it gets leave. Raises ApiError, ClientGoneError."""
        length = self.head.length
        if self.head.expects_continue and (length is None or length <= self.transport.limits.body):
            self.transport.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        try:
            body = self.transport.read_body(length)
        except ApiError:
            self.close_after = True  # where the next request begins is not known
            raise
        self._is_body_read = True
        return body

    def answer(self, status: int, body: bytes, content_type: str, fields: Fields = ()) -> None:
        """Send a whole answer. A HEAD request gets all of it but the body. Raises ClientGoneError."""
        can_discard = self._prepare_to_discard()
        own = [("Content-Type", content_type), ("Content-Length", str(len(body))), *fields]
        if status == 204:
            own, body = list(fields), b""  # RFC 9110, 8.6
        head = self._head(status, own)
        self.transport.send(head, b"" if self.head.method == "HEAD" else body)
        if can_discard:
            try:
                self.transport.discard(self.head.length)
            except ApiError:
                self.close_after = True
                return
            self._is_body_read = True

    def stream(self) -> "EventStream":
        """Begin an answer of server-sent events. Its head goes with what is sent or pushed first."""
        in_chunks = self.head.is_11
        if not in_chunks:
            self.close_after = True  # which is how the client finds its end
        own = [("Content-Type", "text/event-stream"), ("Cache-Control", "no-cache"), ("X-Accel-Buffering", "no")]
        if in_chunks:
            own.append(("Transfer-Encoding", "chunked"))
        self.transport.keep(self._head(200, own))
        return EventStream(self, in_chunks)

    def _prepare_to_discard(self) -> bool:
        """Settle what becomes of a body that was not read: discarded after the answer, or left with the
        connection."""
        if self._is_body_read:
            return False
        length = self.head.length
        if self.head.expects_continue or length is None or length > MAX_DISCARDED:
            self.close_after = True
        return not self.close_after

    def _head(self, status: int, fields: Fields) -> bytes:
        self.status = status
        lines = [f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}", f"Date: {formatdate(usegmt=True)}",
                 f"Server: llama/{__version__}"]
        lines += [f"{name}: {value}" for name, value in (*fields, *self.fields)]
        if self.close_after:
            lines.append("Connection: close")
        elif not self.head.is_11:
            lines.append("Connection: keep-alive")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class EventStream:
    """Server-sent events, each on its way as soon as it is there."""

    def __init__(self, exchange: Exchange, in_chunks: bool):
        self._exchange = exchange
        self._transport = exchange.transport
        self._in_chunks = in_chunks
        self._said_at = time.monotonic()

    @property
    def silence(self) -> float:
        """Seconds since something was sent."""
        return time.monotonic() - self._said_at

    @property
    def has_pending(self) -> bool:
        """Whether something is still waiting for the client to read."""
        return self._transport.has_pending

    def keep(self, events: Iterable[bytes]) -> None:
        """Have events sent with what is sent or pushed next: each sending wakes the client, and costs both sides."""
        if data := _lines(events):
            self._transport.keep(self._framed(data))

    def send(self, events: Iterable[bytes]) -> None:
        """Send events: the data of each, on one line. Raises ClientGoneError, also for one who reads too slowly."""
        if data := _lines(events):
            self._write(data)

    def beat(self) -> None:
        """A comment, which clients ignore: it shows them, and proxies, that the connection lives."""
        self._write(b": still there\n\n")

    def push(self) -> None:
        """Send what was left of earlier writes, as far as the client takes it."""
        self._transport.write(b"")

    def end(self) -> None:
        """The answer is whole; wait until it is on its way."""
        if self._in_chunks:
            self._transport.write(b"0\r\n\r\n")
        self._transport.flush()

    def break_off(self, error: bytes) -> None:
        """End with an error as the last event. The connection closes with the body unfinished, so that what was
        cut never looks complete."""
        self._exchange.close_after = True
        self.send([error])
        self._transport.flush()

    def _write(self, data: bytes) -> None:
        self._said_at = time.monotonic()
        self._transport.write(self._framed(data))

    def _framed(self, data: bytes) -> bytes:
        return b"%x\r\n%s\r\n" % (len(data), data) if self._in_chunks else data


def _lines(events: Iterable[bytes]) -> bytes:
    return b"".join(b"data: %s\n\n" % data for data in events)


__all__ = ["ClientGoneError", "EventStream", "Exchange"]
