"""The head of a request: bytes to a `Head`, by the letter of RFC 9112.

Whatever two readers might read differently is refused: that is how requests are smuggled past a proxy.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import unquote

from server.errors import ApiError

MAX_FIELDS = 100
MAX_LENGTH_DIGITS = 15

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(%s) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])" % _TOKEN)
_FIELD = re.compile(rb"(%s):([^\x00-\x08\x0a-\x1f\x7f]*)" % _TOKEN)
# A line end that is not CRLF. The last CR may be half of one.
_BARE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n)(?!\Z)")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._~!$&'()*+,;=%-]+)(:[0-9]{0,5})?", re.IGNORECASE)
_ABSOLUTE = re.compile(r"https?://([^/?#]*)([^#]*)", re.IGNORECASE)
# Fields of which a second one would make the request mean two things.
_SINGLE = ("host", "content-length", "transfer-encoding", "content-type", "authorization", "origin", "expect")


@dataclass(frozen=True)
class Head:
    """A request line and its fields.

    path: percent-decoded; query: as it was sent. is_11: HTTP/1.1, else 1.0. fields: values by lower-case name,
    of those that stand more than once all, joined by commas. length: of the body; None: it comes in chunks.
    """

    method: str
    path: str
    query: str
    is_11: bool
    fields: Mapping[str, str]
    length: int | None

    def get(self, name: str) -> str | None:
        """A field's value; None if it is not there."""
        return self.fields.get(name)

    @property
    def keeps_alive(self) -> bool:
        """Whether the client wants to go on with this connection."""
        wishes = {wish.strip().lower() for wish in self.fields.get("connection", "").split(",")}
        return "close" not in wishes and (self.is_11 or "keep-alive" in wishes)

    @property
    def has_body(self) -> bool:
        """Whether bytes follow the head."""
        return self.length != 0

    @property
    def expects_continue(self) -> bool:
        """Whether the client waits for leave to send its body."""
        return self.is_11 and self.has_body and "expect" in self.fields


def refuse_bare_line_ends(received: bytes | bytearray, start: int, end: int) -> None:
    """Look at what has arrived between two places; more may follow. Raises ApiError(400)."""
    if _BARE_LINE_END.search(received, start, end):
        raise _malformed("lines must end with CR LF")


def parse_head(text: bytes) -> Head:
    """Read a head without the empty line that ends it.

    Raises ApiError: 400 for what is malformed, 413, 417, 431, 501 or 505 for what is not taken here.
    """
    request_line, *lines = text.split(b"\r\n")
    match = _REQUEST_LINE.fullmatch(request_line)
    if match is None:
        raise _malformed("the first line must be `METHOD /path HTTP/1.1`")
    method, target = match[1].decode(), match[2].decode()
    if match[3] != b"1":
        raise ApiError(505, "the HTTP version must be 1.0 or 1.1", code="http_version")
    is_11 = match[4] != b"0"
    fields = _fields(lines)
    target, authority = _origin_form(target)
    hosts = [host for host in (fields.get("host"), authority) if host is not None]
    if is_11 and "host" not in fields or not all(map(_HOST.fullmatch, hosts)):
        raise _malformed("a request must have a Host field, and it must be `name` or `name:port`")
    if authority is not None:
        fields["host"] = authority  # RFC 9112, 3.2.2: the target's outranks the field
    if fields.get("expect", "100-continue").lower() != "100-continue":
        raise ApiError(417, "the only expectation that is met is 100-continue", code="expectation")
    path, _, query = target.partition("?")
    return Head(method, unquote(path), query, is_11, fields, _body_length(fields, is_11))


def parse_field(line: bytes) -> tuple[str, str]:
    """A header field's name in lower case, and its value. Raises ApiError(400)."""
    match = _FIELD.fullmatch(line)
    if match is None:
        raise _malformed("a header field must be `Name: value`, on one line and without control characters")
    return match[1].decode().lower(), match[2].strip(b" \t").decode("latin-1")


def _fields(lines: list[bytes]) -> dict[str, str]:
    if len(lines) > MAX_FIELDS:
        raise ApiError(431, f"a request may have at most {MAX_FIELDS} header fields", code="headers_too_large")
    fields: dict[str, str] = {}
    for line in lines:
        name, value = parse_field(line)
        if name in fields and name in _SINGLE:
            raise _malformed(f"the header field {name} must stand only once")
        fields[name] = f"{fields[name]}, {value}" if name in fields else value
    return fields


def _origin_form(target: str) -> tuple[str, str | None]:
    """The target as /path?query, and the authority where the target has one, as requests to proxies do."""
    if target.startswith("/") or target == "*":
        return target, None
    if match := _ABSOLUTE.fullmatch(target):
        return match[2] if match[2].startswith("/") else f"/{match[2]}", match[1]
    raise _malformed("the request's target must be a path")


def _body_length(fields: Mapping[str, str], is_11: bool) -> int | None:
    coding, length = fields.get("transfer-encoding"), fields.get("content-length")
    if coding is not None:
        if length is not None:
            raise _malformed("give Content-Length or Transfer-Encoding, not both")
        if not is_11:
            raise _malformed("Transfer-Encoding is of HTTP/1.1")
        if coding.lower() != "chunked":
            raise ApiError(501, "the only transfer coding that is taken is chunked", code="transfer_encoding")
        return None
    if length is None:
        return 0
    if not re.fullmatch("[0-9]+", length):
        raise _malformed("Content-Length must be digits")
    if len(length) > MAX_LENGTH_DIGITS:
        raise ApiError(413, "the body is larger than the server takes", code="body_too_large")
    return int(length)


def _malformed(message: str) -> ApiError:
    return ApiError(400, f"this is not a good HTTP request: {message}", code="malformed_http")
