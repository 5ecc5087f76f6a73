"""server.http.listener: how many connections there are, and that what becomes of one is no other's concern."""

import contextlib
import errno
import logging
import socket
import threading

import pytest

from server.http import listener as listener_module
from server.http.listener import Listener
from tests.server.live import listening, tell, wait_until
from tests.server.raw import PATIENCE, get, post


@contextlib.contextmanager
def holding(**limits):
    """A site whose answers to /hold wait, and the events by which they say so and are let go."""
    begun, let_go = threading.Semaphore(0), threading.Event()

    def hold(exchange):
        if exchange.head.path == "/hold":
            begun.release()
            assert let_go.wait(PATIENCE)
        tell(exchange)

    with listening(hold, **limits) as site:
        try:
            yield site, begun, let_go
        finally:
            let_go.set()


# ---- how many --------------------------------------------------------------------------------------------


def test_connections_have_a_cap():
    with listening(connections=2) as site, site.open() as first, site.open() as second:
        assert first.ask(get("/")).status == second.ask(get("/")).status == 200
        with site.open() as third:
            answer = third.answer()  # it has not even asked
            assert (answer.status, answer.code) == (503, "too_many_connections")
            assert answer.fields["retry-after"] == "1" and answer.fields["connection"] == "close"
            assert third.rest() == b""
        with site.open() as fourth:
            assert fourth.ask(post("/", b"x" * 100_000)).status == 503  # also one who sends before reading
        assert first.ask(get("/")).status == 200  # whom that does not concern
        assert site.connections == 2
        first.close()
        wait_until(lambda: site.connections == 1)
        wait_until(lambda: site.ask(get("/")).status == 200)


def test_those_who_are_turned_away_have_a_cap_too(monkeypatch):
    monkeypatch.setattr(listener_module, "_TURNED_AWAY", 1)
    with listening(connections=1) as site, site.open() as first:
        assert first.ask(get("/")).status == 200
        with site.open() as second:
            assert second.answer().status == 503
            with site.open() as third:  # while the second has not closed its end
                assert third.rest() == b""
        assert first.ask(get("/")).status == 200
        wait_until(lambda: site.listener._num_turned_away == 0)
        with site.open() as fourth:
            assert fourth.answer().status == 503


def test_many_may_knock_at_once():
    with listening(start=False) as site, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(site.open()) for _ in range(300)]  # nobody has accepted one yet
        site.listener.start()
        for client in clients:
            client.send(get("/"))
        assert {client.answer().status for client in clients} == {200}
        wait_until(lambda: site.connections == 300)


def test_connections_are_counted_down_however_they_end(caplog):
    with listening() as site:
        for abruptly in (False, True):
            for request in (b"", b"GET /", get("/"), post("/", b"12345")[:-1], b"nonsense\r\n\r\n",
                            get("/", "Transfer-Encoding: chunked", method="POST") + b"5\r\nab"):
                client = site.open().send(request)
                wait_until(lambda: site.connections == 1)
                client.close(abruptly)
                wait_until(lambda: site.connections == 0)
        assert site.ask(get("/")).status == 200
    assert not caplog.records


# ---- each alone ------------------------------------------------------------------------------------------


def test_small_answers_leave_at_once():
    def nodelay(exchange):
        is_on = exchange.transport.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        exchange.answer(200, str(int(is_on != 0)).encode(), "text/plain")

    with listening(nodelay) as site:
        assert site.ask(get("/")).body == b"1"


def test_one_that_waits_keeps_no_other_waiting():
    with holding() as (site, begun, let_go), site.open() as waiting:
        waiting.send(get("/hold"))
        assert begun.acquire(timeout=PATIENCE)
        assert site.ask(get("/")).status == 200
        let_go.set()
        assert waiting.answer().status == 200


def test_a_defect_ends_one_connection(caplog):
    def fail(exchange):
        if exchange.head.path == "/defect":
            raise ZeroDivisionError("a defect")
        tell(exchange)

    with listening(fail) as site, site.open() as other:
        assert other.ask(get("/")).status == 200
        with site.open() as client:
            client.send(get("/defect"))
            assert client.rest() == b""
        assert other.ask(get("/")).status == 200
        wait_until(lambda: site.connections == 1)
    [record] = caplog.records
    assert record.levelno == logging.ERROR and record.exc_info


def test_a_defect_in_turning_away_takes_no_place(monkeypatch):
    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)

    def fail(exchange, error):
        raise ZeroDivisionError("a defect")

    with listening(connections=1) as site, site.open() as first:
        assert first.ask(get("/")).status == 200
        site.listener._refuse = fail
        with site.open() as second:
            assert second.rest() == b""
        wait_until(lambda: raised and site.listener._num_turned_away == 0)


def test_without_threads_or_descriptors_it_goes_on_when_there_are_some(monkeypatch, caplog):
    class Scarce:
        """The listening socket, which fails at first."""

        def __init__(self, real):
            self.real, self.failures = real, 2

        def accept(self):
            if self.failures:
                self.failures -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return self.real.accept()

        def __getattr__(self, name):
            return getattr(self.real, name)

    start, refusals = threading.Thread.start, [RuntimeError("can't start new thread")]

    def maybe_start(thread):
        if thread.name == "connection" and refusals:
            raise refusals.pop()
        start(thread)

    with listening(start=False) as site:
        site.listener._socket = Scarce(site.listener._socket)
        monkeypatch.setattr(threading.Thread, "start", maybe_start)
        site.listener.start()
        with site.open() as client:
            assert client.rest() == b""
        assert site.ask(get("/")).status == 200
        wait_until(lambda: not site.listener._connections)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "cannot accept a connection", "cannot accept a connection", "cannot serve a connection"]


# ---- the end ---------------------------------------------------------------------------------------------


def test_the_end_lets_answers_finish_and_closes_what_is_idle():
    with holding() as (site, begun, let_go), site.open() as idle, site.open() as busy:
        assert idle.ask(get("/")).status == 200
        busy.send(get("/hold"))
        assert begun.acquire(timeout=PATIENCE)
        stopping = threading.Thread(target=site.listener.stop, args=(600,))
        stopping.start()
        assert idle.rest() == b""
        assert stopping.is_alive()
        with pytest.raises(ConnectionRefusedError):
            site.open()
        let_go.set()
        assert busy.answer().status == 200
        assert busy.rest() == b""  # although it asked to stay
        busy.close()
        stopping.join(PATIENCE)
        assert not stopping.is_alive()
        wait_until(lambda: site.connections == 0)


def test_the_end_does_not_wait_for_ever():
    with holding() as (site, begun, let_go), site.open() as busy:
        busy.send(get("/hold"))
        assert begun.acquire(timeout=PATIENCE)
        site.listener.stop(0.05)
        assert busy.rest() == b""
        assert site.connections == 1  # what is worked on there does not know yet


def test_an_address_in_use_or_unknown_is_an_os_error():
    with listening() as site:
        with pytest.raises(OSError, match="in use"):
            Listener("127.0.0.1", site.port, None, None, None)
    with pytest.raises(OSError):
        Listener("no.such.host.invalid", 0, None, None, None)
