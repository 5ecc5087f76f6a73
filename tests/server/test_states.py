"""What a front says while it cannot do what is asked, or not now: loading, lost, stopping, full, defective."""

import os
import signal
import threading
from contextlib import ExitStack

import pytest

from llama import __version__
from server import routes
from server.front import Front, Settings
from tests.server.live import CONTEXT, NAME, serving, wait_until
from tests.server.live import small as small
from tests.server.raw import CHAT, PATIENCE, Client, chat, get, post
from tests.server.test_routes import GETS, POSTS


def assert_unavailable(served, state, health):
    assert served.ask(get("/health")).status == health
    ready = served.ask(get("/ready"))
    assert (ready.status, ready.json["status"]) == (503, state) and int(ready.fields["retry-after"]) > 0
    for path in (CHAT, "/v1/completions"):
        answer = served.ask(post(path, POSTS[path]))
        assert (answer.status, answer.code) == (503, f"engine_{state}")
        assert answer.json["error"]["type"] == "server_error"
        assert int(answer.fields["retry-after"]) > 0
    assert served.ask(get("/version")).json == {"version": __version__}
    assert served.ask(get("/metrics")).status == 200 and served.ask(get("/")).status == 200


def test_before_the_checkpoint_is_read(small, monkeypatch):
    front = Front(Settings(names=(NAME,)))
    monkeypatch.setattr(front.supervisor, "_heard", front.supervisor._heard - 3600)  # the download takes an hour
    front.listener.start()
    try:
        with Client(front.listener.port) as client:
            assert client.ask(get("/health")).json["status"] == "loading"
            for request in (get("/v1/models"), get("/openapi.json"), *(post(*one) for one in POSTS.items())):
                answer = client.ask(request)
                assert (answer.status, answer.code) == (503, "engine_loading")
            assert client.ask(get("/ready")).status == 503
    finally:
        front.stop(0)


def test_while_the_engine_loads(small):
    with serving(small, state="loading", engine={"load_seconds": 600}) as served:
        assert_unavailable(served, "loading", 200)
        assert served.ask(get("/v1/models")).status == 200  # the text side is there
        assert served.ask(post("/tokenize", POSTS["/tokenize"])).status == 200


def test_while_the_engine_is_lost(small):
    with serving(small, engine={"retry_seconds": 600}) as served:
        os.kill(served.supervisor.snapshot()["engine_pid"], signal.SIGKILL)
        wait_until(lambda: served.supervisor.state == "lost")
        assert_unavailable(served, "lost", 503)
        assert "SIGKILL" in served.ask(get("/health")).json["detail"]


def test_when_there_is_no_engine_any_more(small):
    with serving(small, state="failed", engine={"load_error": "no memory"}) as served:
        assert_unavailable(served, "failed", 503)
        assert "no memory" in served.ask(chat()).json["error"]["message"]


def test_while_it_stops(small):
    with serving(small, engine={"pace": 0.001}) as served, served.open() as other, served.open() as running:
        assert other.ask(get("/ready")).status == 200
        running.send(chat(stream=True, max_tokens=CONTEXT - 100)).head()
        served.wait_for(running=1)
        stopping = threading.Thread(target=served.front.stop, args=(600,))
        stopping.start()
        wait_until(lambda: served.supervisor.state == "draining")
        assert_unavailable(served, "draining", 200)
        assert other.ask(get("/ready")).fields["connection"] == "close"  # also for those who were here before
        assert other.rest() == b""
        other.close()
        running.take_until(b'"content":"z"')  # goes on
        served.front.stop(0)  # the second signal
        assert b"engine_lost" in running.rest()
        running.close()
        stopping.join()


def test_under_overload_there_are_still_signs_of_life(small, tmp_path):
    hold = tmp_path / "hold"
    with serving(small, engine={"max_queued_requests": 1, "max_running": 1, "hold": str(hold)}) as served:
        hold.touch()  # a prefill without end
        try:
            with served.open() as waiting:
                waiting.send(chat())
                served.wait_for(waiting=1)
                for _ in range(20):
                    full = served.ask(chat())
                    assert (full.status, full.code, full.fields["retry-after"]) == (429, "queue_full", "1")
                    assert full.json["error"]["type"] == "rate_limit_error"
                with served.open() as large:  # is refused before it has sent its body
                    large.send(get(CHAT, "Content-Type: application/json", "Content-Length: 4000000", method="POST"))
                    assert large.answer().status == 429
                assert served.metric("request_failure_total", reason="queue_full") == 21
                for path in GETS:
                    assert served.ask(get(path)).status == 200
                assert served.ask(get("/health")).json["engine"]["waiting"] == 1
        finally:
            hold.unlink()


def test_requests_are_read_few_at_a_time_and_large_ones_apart(small, monkeypatch):
    """So that nobody waits for the interpreter behind all of a crowd."""
    entered, may_go = [], threading.Event()

    def read(body, served):
        entered.append(len(body))
        assert may_go.wait(PATIENCE)
        return {}

    monkeypatch.setattr(routes, "tokenize", read)
    small_body, large_body = b" " * 10, b" " * 100_000
    with serving(small) as served, ExitStack() as stack:
        clients = [stack.enter_context(served.open()) for _ in range(10)]
        for number, client in enumerate(clients):
            client.send(post("/tokenize", large_body if number % 2 else small_body))
        wait_until(lambda: len(entered) == 4)
        assert served.ask(get("/health")).status == 200
        assert sorted(entered) == [10, 10, 100_000, 100_000]
        may_go.set()
        assert [client.answer().status for client in clients] == [200] * 10


@pytest.fixture
def served(small):
    with serving(small) as served:
        yield served


def test_a_defect_is_500_and_says_nothing(served, monkeypatch, caplog):
    def fail():
        raise ZeroDivisionError("the secret of this house")

    monkeypatch.setattr(served.supervisor, "snapshot", fail)
    with served.open() as client:
        answer = client.ask(get("/health"))
        assert (answer.status, answer.fields["connection"]) == (500, "close")
        assert b"secret" not in answer.body and answer.json["error"]["type"] == "server_error"
        assert client.rest() == b""
    assert "the secret of this house" in caplog.text
