"""HTTP/1.x on plain sockets, for clients that may be slow, broken or hostile. Knows nothing of models.

    listener   accepts, counts, gives every connection a thread
    exchange   one request and its answer, in one piece or as server-sent events
    head       the head of a request, read strictly
    transport  bytes in and out, with deadlines
    hangups    notices clients that go away while they are being worked for
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class HttpLimits:
    """What one client may cost. Sizes in bytes, times in seconds.

    head, body: sizes of a request's parts. head_seconds, body_seconds: from the first byte of each to its last.
    idle_seconds: between two requests of a connection. stall_seconds: without a byte taken, an answer is given
    up. pending: of a stream's bytes, how many may wait for a slow reader. connections: open at once.
    """

    head: int = 16 * 1024
    body: int = 4 * 1024 * 1024
    head_seconds: float = 10.0
    body_seconds: float = 60.0
    idle_seconds: float = 75.0
    stall_seconds: float = 30.0
    pending: int = 256 * 1024
    connections: int = 1024
