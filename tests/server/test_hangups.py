"""Clients that go away: noticed whatever is done for them at that time, and their work is given up."""

import itertools
import socket
import threading

import pytest

from server.http.hangups import Hangups
from tests.server.live import CONTEXT, serving, wait_until
from tests.server.live import small as small
from tests.server.raw import PATIENCE, chat, get, post

# ---- the watch -------------------------------------------------------------------------------------------


@pytest.fixture
def pair():
    """Two ends of a connection; the first is ours, and does not wait."""
    listener = socket.create_server(("127.0.0.1", 0))
    theirs = socket.create_connection(listener.getsockname())
    ours, _ = listener.accept()
    ours.setblocking(False)
    with listener, theirs, ours:
        yield ours, theirs


def reset(theirs):
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    theirs.close()


@pytest.mark.parametrize("leave", [socket.socket.close, reset, lambda theirs: theirs.shutdown(socket.SHUT_WR)])
@pytest.mark.parametrize("before", [False, True])
def test_whoever_goes_is_noticed_once(pair, leave, before):
    ours, theirs = pair
    noticed = threading.Semaphore(0)
    if before:
        leave(theirs)
    with Hangups().watching(ours, noticed.release):
        if not before:
            leave(theirs)
        assert noticed.acquire(timeout=PATIENCE)
    assert not noticed.acquire(timeout=0.02)


def test_whoever_only_sends_has_not_gone(pair):
    ours, theirs = pair
    hangups, noticed = Hangups(), []
    with hangups.watching(ours, lambda: noticed.append(ours)):
        theirs.send(b"the next request")
        wait_until(lambda: not hangups._selector.get_map())  # it has looked, and looks no more
    assert not noticed
    assert ours.recv(100) == b"the next request"


def test_after_the_watch_nobody_cares(pair):
    ours, theirs = pair
    hangups, noticed = Hangups(), []
    with hangups.watching(ours, lambda: noticed.append("first")):
        pass
    done = threading.Event()
    with hangups.watching(ours, done.set):  # another may follow on the same connection
        theirs.close()
        assert done.wait(PATIENCE)
    assert not noticed


def test_a_watch_that_has_just_ended_harms_no_other(pair):
    """The watching thread has woken for a client, whose own thread ends the watch and closes before it looks."""
    ours, theirs = pair
    hangups = Hangups()
    with hangups.watching(ours, None):
        key = hangups._selector.get_key(ours)
    theirs.close()
    ours.close()
    assert hangups._is_gone(key) is False
    successor, peer = socket.socketpair()
    with successor, peer:
        assert successor.fileno() == key.fd or peer.fileno() == key.fd  # the number is used again
        with hangups.watching(successor, None), hangups.watching(peer, None):
            assert hangups._is_gone(key) is False
            assert len(hangups._selector.get_map()) == 2


# ---- with an engine --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hold(tmp_path_factory):
    """While this file is there, the engine is in the middle of a step."""
    return tmp_path_factory.mktemp("hold") / "hold"


@pytest.fixture(scope="module")
def served(small, hold):
    with serving(small, engine={"max_running": 1, "pace": 0.001, "hold": str(hold)}) as served:
        yield served


def endless(**fields):
    """So long that a test would not see its end."""
    return chat(max_tokens=CONTEXT - 100, **fields)


def assert_is_free(served):
    """There is one place, and it can be had: the engine has forgotten whoever had it."""
    served.wait_for(running=0, waiting=0)
    assert served.ask(chat(max_tokens=3)).json["choices"][0]["message"]["content"] == "abc"


def cancelled(served):
    return served.metric("request_failure_total", reason="cancelled")


@pytest.fixture(autouse=True)
def _afterwards_nothing_is_left(request):
    yield
    if "served" in request.fixturenames:
        served = request.getfixturevalue("served")
        assert_is_free(served)
        wait_until(lambda: served.metric("http_connections") == 0)


HOW = [pytest.param(stream, abruptly, id=f"{'stream' if stream else 'whole'}-{'reset' if abruptly else 'closed'}")
       for stream, abruptly in itertools.product((True, False), repeat=2)]


@pytest.mark.parametrize(("stream", "abruptly"), HOW)
def test_while_it_is_queued(served, stream, abruptly):
    before = cancelled(served)
    with served.open() as running:
        running.send(endless(stream=True)).head()
        served.wait_for(running=1)
        client = served.open().send(endless(stream=stream))
        served.wait_for(running=1, waiting=1)
        client.close(abruptly)
        served.wait_for(running=1, waiting=0)
        wait_until(lambda: cancelled(served) == before + 1)
        running.take_until(b'"content":"z"')  # whom that does not concern


@pytest.mark.parametrize(("stream", "abruptly"), HOW)
def test_while_its_prompt_is_computed(served, hold, stream, abruptly):
    before = cancelled(served)
    hold.touch()
    try:
        client = served.open().send(endless(stream=stream))
        served.wait_for(waiting=1)
        client.close(abruptly)
        served.wait_for(waiting=0)  # the engine is still in that step, and will not make another for this
        wait_until(lambda: cancelled(served) == before + 1)
    finally:
        hold.unlink()
    assert_is_free(served)


@pytest.mark.parametrize(("stream", "abruptly"), HOW)
def test_while_it_is_generated(served, stream, abruptly):
    before = cancelled(served)
    client = served.open().send(endless(stream=stream))
    served.wait_for(running=1)
    if stream:
        client.take_until(b'"content":"c"')
    client.close(abruptly)
    served.wait_for(running=0)
    wait_until(lambda: cancelled(served) == before + 1)


def test_all_prompts_and_choices_of_a_request_go_with_it(served):
    client = served.open().send(post("/v1/completions", {"prompt": ["a", "b", "c"], "n": 1, "max_tokens": 8000}))
    served.wait_for(running=1, waiting=2)
    client.close()
    assert_is_free(served)


def test_a_client_that_will_send_no_more_has_gone(served):
    with served.open() as client:
        client.send(endless())
        served.wait_for(running=1)
        client.socket.shutdown(socket.SHUT_WR)
        served.wait_for(running=0)
        assert client.rest() == b""


def test_a_client_that_sent_more_is_missed_when_it_is_written_to(served):
    client = served.open().send(endless(stream=True), get("/health"))
    served.wait_for(running=1)
    client.close()
    served.wait_for(running=0)


def test_a_client_that_sent_more_and_stays_gets_all(served):
    with served.open() as client:
        client.send(chat(max_tokens=3, stream=True), get("/health"))
        assert client.answer().events[-1] == b"[DONE]"
        assert client.answer().json["status"] == "ready"
