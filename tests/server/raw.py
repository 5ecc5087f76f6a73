"""A client that sends any bytes, and reads answers strictly; and the requests that it sends."""

import json
import socket
from dataclasses import dataclass, replace

PATIENCE = 30  # seconds until a wait is a failure; never what is measured
CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Answer:
    """fields: by lower-case name. chunks: of the body, None where it did not come in chunks. is_whole: the body
    came to its end."""

    status: int
    fields: dict[str, str]
    body: bytes = b""
    chunks: tuple[bytes, ...] | None = None
    is_whole: bool = True

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def code(self):
        """Of the error that it is."""
        error = self.json["error"]
        assert list(error) == ["message", "type", "param", "code"]
        return error["code"]

    @property
    def events(self):
        """The data of its events; comments are left out."""
        assert self.fields["content-type"] == "text/event-stream" and self.body.endswith(b"\n\n")
        events = self.body.split(b"\n\n")[:-1]
        return [event.removeprefix(b"data: ") for event in events if not event.startswith(b":")]


class Client:
    """A connection. Its answers are read strictly. room: the receive buffer's size, for those who read slowly."""

    def __init__(self, port, room=None):
        self.socket = socket.socket()
        self.socket.settimeout(PATIENCE)
        if room is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        self.socket.connect(("127.0.0.1", port))
        self.received = bytearray()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.socket.close()

    def send(self, *parts):
        for part in parts:
            self.socket.sendall(part)
        return self

    def ask(self, *parts):
        return self.send(*parts).answer()

    def close(self, abruptly=False):
        """abruptly: with a reset, as when a machine crashes and comes back."""
        if abruptly:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()

    def _receive(self):
        data = self.socket.recv(65536)
        self.received += data
        return bool(data)

    def take(self, size):
        while len(self.received) < size:
            assert self._receive(), f"it ended with {bytes(self.received)!r}"
        taken = bytes(self.received[:size])
        del self.received[:size]
        return taken

    def take_until(self, end):
        while end not in self.received:
            assert self._receive(), f"it ended with {bytes(self.received)!r}"
        return self.take(self.received.index(end) + len(end))

    def rest(self):
        """All until the server closes; a reset fails."""
        while self._receive():
            pass
        return self.take(len(self.received))

    def head(self):
        """An answer's head; the body is left to come."""
        lines = self.take_until(b"\r\n\r\n")[:-4].decode("latin-1").split("\r\n")
        version, status, phrase = lines[0].split(" ", 2)
        assert version == "HTTP/1.1" and len(status) == 3 and phrase
        fields = dict(line.lower().split(": ", 1)[:1] + line.split(": ", 1)[1:] for line in lines[1:])
        assert len(fields) == len(lines) - 1, f"a field stands twice: {lines}"
        return Answer(int(status), fields)

    def answer(self, to_head=False):
        """The next answer, and no byte more. to_head: to a HEAD request."""
        head = self.head()
        if to_head or head.status in (100, 204):
            return head
        if head.fields.get("transfer-encoding") == "chunked":
            assert "content-length" not in head.fields
            return self._chunked(head)
        if "content-length" in head.fields:
            return replace(head, body=self.take(int(head.fields["content-length"])))
        assert head.fields["connection"] == "close"
        return replace(head, body=self.rest())

    def chunk(self):
        """A chunk of the body; b"" for the last; None if there is none because the server closed in between."""
        if not self.received and not self._receive():
            return None
        size = int(self.take_until(b"\r\n")[:-2], 16)
        data = self.take(size + 2)
        assert data.endswith(b"\r\n")
        return data[:-2]

    def _chunked(self, head):
        chunks = []
        while data := self.chunk():
            chunks.append(data)
        return replace(head, body=b"".join(chunks), chunks=tuple(chunks), is_whole=data == b"")


# ---- requests --------------------------------------------------------------------------------------------


def get(path, *fields, method="GET", version="1.1"):
    """A request without a body. fields: lines of its head."""
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: localhost", *fields, "", ""]).encode("latin-1")


def post(path, body, *fields, **options):
    """A request with a JSON body: bytes, or what is to be JSON."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return get(path, "Content-Type: application/json", f"Content-Length: {len(body)}", *fields,
               **{"method": "POST", **options}) + body


def chat(*fields, path=CHAT, version="1.1", **body):
    """A request for a chat."""
    return post(path, {"messages": [{"role": "user", "content": "Hello"}]} | body, *fields, version=version)
