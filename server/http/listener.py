"""Accepts connections, and gives each a thread that serves its requests one after another."""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

from server.errors import ApiError
from server.http import HttpLimits
from server.http.exchange import Exchange
from server.http.head import Head, parse_head
from server.http.transport import ClientGoneError, Transport

BACKLOG = 1024
# Connections beyond the cap that are told so at the same time; those beyond these are closed without a word.
_TURNED_AWAY = 64
_NO_HEAD = Head("GET", "/", "", True, {}, 0)  # stands for a head that could not be read, so that it can be answered

log = logging.getLogger("llama.http")


class Listener:
    """A listening socket and its connections.

    handle answers an exchange; refuse answers one whose head was no good, or for which there is no room. Both run
    in the connection's thread, and raise nothing but ClientGoneError. on_connections is called with +1 and -1.
    """

    def __init__(self, host: str, port: int, limits: HttpLimits, handle: Callable[[Exchange], None],
                 refuse: Callable[[Exchange, ApiError], None],
                 on_connections: Callable[[int], None] = lambda change: None):
        """Bind. Raises OSError."""
        self._limits = limits
        self._handle = handle
        self._refuse = refuse
        self._on_connections = on_connections
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                      flags=socket.AI_PASSIVE)[0]
        self._socket = socket.create_server(address, family=family, backlog=BACKLOG)
        self.port: int = self._socket.getsockname()[1]
        self._changed = threading.Condition()
        self._connections: dict[Transport, bool] = {}  # of those within the cap, whether it is between requests
        self._num_turned_away = 0
        self._is_stopping = False

    def start(self) -> None:
        """Begin to accept."""
        threading.Thread(target=self._accept, name="accept", daemon=True).start()

    def stop(self, patience: float) -> None:
        """Accept no more, close what is idle, and give answers that are under way so many seconds to end."""
        self._is_stopping = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        deadline = time.monotonic() + patience
        with self._changed:
            for transport, is_idle in self._connections.items():
                if is_idle:
                    _hang_up(transport)
            self._changed.wait_for(lambda: not self._connections, timeout=max(deadline - time.monotonic(), 0))
            for transport in self._connections:
                _hang_up(transport)

    def _accept(self) -> None:
        while not self._is_stopping:
            try:
                client, address = self._socket.accept()
            except OSError as error:
                if not self._is_stopping:
                    log.warning("cannot accept a connection: %s", error)
                    time.sleep(0.1)  # out of descriptors or memory: others must close first
                continue
            try:
                self._admit(client, address[0])
            except (OSError, RuntimeError) as error:  # no more threads, or a client that has gone already
                log.warning("cannot serve a connection: %s", error)
                client.close()

    def _admit(self, client: socket.socket, peer: str) -> None:
        """Give a connection its thread, or have it turned away."""
        transport = Transport(client, self._limits)
        with self._changed:
            is_over = len(self._connections) >= self._limits.connections
            if is_over and self._num_turned_away >= _TURNED_AWAY:
                client.close()
                return
            if is_over:
                self._num_turned_away += 1
            else:
                self._connections[transport] = True
        target = self._turn_away if is_over else self._serve
        try:
            threading.Thread(target=target, args=(transport, peer), name="connection", daemon=True).start()
        except RuntimeError:
            self._leave(transport, is_over)
            raise

    def _leave(self, transport: Transport, was_over: bool) -> None:
        with self._changed:
            if was_over:
                self._num_turned_away -= 1
            else:
                del self._connections[transport]
            self._changed.notify_all()

    def _turn_away(self, transport: Transport, peer: str) -> None:
        exchange = Exchange(transport, _NO_HEAD, peer)
        exchange.close_after = True
        try:
            with contextlib.suppress(ClientGoneError):
                self._refuse(exchange, ApiError(503, f"{self._limits.connections} connections are open, which is "
                                                "all that there may be; try again later",
                                                code="too_many_connections", retry_after=1))
        finally:
            transport.close()
            self._leave(transport, was_over=True)

    def _serve(self, transport: Transport, peer: str) -> None:
        self._on_connections(1)
        is_polite = True
        try:
            while self._serve_one(transport, peer):
                pass
        except ClientGoneError:
            is_polite = False
        except Exception:  # a defect, and this connection's alone
            log.exception("a connection was given up")
            is_polite = False
        finally:
            transport.close(1.0 if is_polite else 0.0)
            self._on_connections(-1)
            self._leave(transport, was_over=False)

    def _serve_one(self, transport: Transport, peer: str) -> bool:
        """Read a request and have it answered; whether another may follow. Raises ClientGoneError."""
        try:
            text = transport.read_head()
            if text is None:
                return False
            head = parse_head(text)
        except ApiError as error:
            exchange = Exchange(transport, _NO_HEAD, peer)
            exchange.close_after = True
            self._refuse(exchange, error)
            return False
        exchange = Exchange(transport, head, peer)
        exchange.close_after = exchange.close_after or self._is_stopping
        with self._changed:
            self._connections[transport] = False
        self._handle(exchange)
        with self._changed:
            self._connections[transport] = True
        return not (exchange.close_after or self._is_stopping)


def _hang_up(transport: Transport) -> None:
    """Wake whoever waits for this client, for the last time. Its thread closes the socket."""
    with contextlib.suppress(OSError):
        transport.socket.shutdown(socket.SHUT_RDWR)
