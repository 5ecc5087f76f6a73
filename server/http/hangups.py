"""Notices clients that go away while they are being worked for: one thread for all connections."""

import contextlib
import selectors
import socket
import threading
from collections.abc import Callable, Iterator


class Hangups:
    """Watches sockets that nobody reads from.

    A client that only closes its writing side counts as gone, as in most servers. One that sends its next
    request early is not watched any further: its end is then noticed when it is written to.
    """

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="hangups", daemon=True).start()

    @contextlib.contextmanager
    def watching(self, client: socket.socket, on_hangup: Callable[[], None]) -> Iterator[None]:
        """While the context lasts, call `on_hangup` once if the client goes, from the watching thread."""
        with self._lock:
            self._selector.register(client, selectors.EVENT_READ, on_hangup)
        try:
            yield
        finally:
            with self._lock, contextlib.suppress(KeyError):
                self._selector.unregister(client)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                with self._lock:
                    gone = self._is_gone(key)
                if gone:
                    key.data()

    def _is_gone(self, key: selectors.SelectorKey) -> bool:
        """Whether this very watch is still on, and its client has closed. Ends the watch if there is news."""
        if self._selector.get_map().get(key.fd) is not key:  # by number: the socket may be closed
            return False  # it ended meanwhile; its number may already be another connection's
        try:
            is_gone = not key.fileobj.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            is_gone = True
        self._selector.unregister(key.fileobj)
        return is_gone
