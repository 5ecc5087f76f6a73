"""What clients see when things go wrong: every answer ends whole, or with exactly one error and no [DONE]."""

import json
import os
import re
import signal

from tests.server.clients import CHAT, HELLO, Server, outcome, texts, wait_for_texts
from tests.server.raw import Answer, Client, post
from tests.server.scripted_http import pieces, scripted


def ask(seed: int, max_tokens: int | None = None, **fields) -> bytes:
    """A request for a stream of chat; without max_tokens it has no end."""
    limit = {} if max_tokens is None else {"max_tokens": max_tokens}
    return post(CHAT, {"messages": HELLO, "stream": True, "seed": seed} | limit | fields)


def begun(server: Server, request: bytes) -> Client:
    """A connection whose request is the only one under way, and has begun; nothing of it may be to be seen."""
    client = server.open(request)
    server.wait_for(lambda: server.metric("num_requests_running") == 1)
    return client


def right_answer(client: Client, seed: int, n: int = 1) -> Answer:
    """The answer, which ended as a stream may end, and whose texts are right as far as they go."""
    answer = client.answer()
    assert outcome(answer) in ("whole", "error")
    for index in range(n):
        got = texts(answer, index)
        assert got == pieces(seed, len(got), index)
    return answer


def assert_whole(client: Client, seed: int, count: int) -> None:
    answer = right_answer(client, seed)
    assert outcome(answer) == "whole" and len(texts(answer)) == count


def assert_cut(client: Client, seed: int, words: str, code: str, n: int = 1) -> Answer:
    answer = right_answer(client, seed, n)
    assert outcome(answer) == "error"
    assert client.rest() == b""  # the connection is closed
    error = json.loads(answer.events[-1])["error"]
    assert words in error["message"] and error["code"] == code
    return answer


# ---- the server is told to stop -------------------------------------------------------------------------


def test_sigterm_with_64_open_streams():
    with scripted("--drain-seconds", "600", pace=0.005, max_running=100) as server:
        waiting = begun(server, post(CHAT, {"messages": HELLO, "seed": 1}))
        endless = {seed: server.open(ask(seed)) for seed in range(44)}
        finite = {seed: server.open(ask(seed, max_tokens=40)) for seed in range(44, 64)}
        for stream in (*endless.values(), *finite.values()):
            wait_for_texts(stream, 1)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: server.get("/ready").status == 503)
        late = server.post(CHAT, {"messages": HELLO, "seed": 1})
        assert (late.status, late.code) == (503, "engine_draining") and int(late.fields["retry-after"]) > 0
        for seed, stream in finite.items():
            assert_whole(stream, seed, 40)
        for stream in endless.values():
            wait_for_texts(stream, 50)  # it goes on for those, who have as long as it was said
        assert server.process.poll() is None
        assert server.stop() == 0  # the second signal ends it at once
        for seed, stream in endless.items():
            assert_cut(stream, seed, "the server is stopping", "engine_lost")
        lost = waiting.answer()
        assert (lost.status, lost.code) == (503, "engine_lost")
        assert "Traceback" not in server.log


def test_what_does_not_end_within_drain_seconds_is_cut():
    with scripted("--drain-seconds", "0.2", pace=0.005) as server, server.open(ask(1)) as stream:
        wait_for_texts(stream, 1)
        assert server.stop() == 0
        assert_cut(stream, 1, "the server is stopping", "engine_lost")


def test_without_work_it_stops_at_once():
    with scripted("--drain-seconds", "600") as server:
        idle = server.open()
        assert server.stop(signal.SIGINT) == 0
        assert idle.rest() == b""


# ---- the engine is gone ---------------------------------------------------------------------------------


def test_sigkill_of_the_engine_twenty_times():
    with scripted(pace=0.002) as server:
        for turn in range(20):
            waiting = begun(server, post(CHAT, {"messages": HELLO, "seed": 1}))
            endless = {seed: server.open(ask(seed, n=1 + seed % 3)) for seed in range(turn, turn + 6)}
            ending = {seed: server.open(ask(seed, max_tokens=2 + turn)) for seed in range(1000, 1004)}
            for stream in ending.values():
                wait_for_texts(stream, 1)
            for stream in endless.values():
                wait_for_texts(stream, 2 + turn)
            os.kill(server.engine_pid(), signal.SIGKILL)
            for seed, stream in endless.items():
                assert_cut(stream, seed, "killed by SIGKILL", "engine_lost", n=1 + seed % 3)
            for seed, stream in ending.items():
                right_answer(stream, seed)  # to its end, or to an error
            lost = waiting.answer()
            assert (lost.status, lost.code) == (503, "engine_lost") and "retry-after" in lost.fields
            server.wait_for(lambda: server.get("/ready").status == 200)
        assert server.get("/health").json["engine"]["num_engines"] == 21
        assert server.metric("engine_starts_total") == 21
        with server.open(ask(5, max_tokens=9)) as stream:
            assert_whole(stream, 5, 9)
        assert "Traceback" not in server.log


def test_an_engine_that_falls_silent_is_replaced():
    with scripted(pace=0.002, silent_seconds=3) as server:
        os.kill(server.engine_pid(), signal.SIGSTOP)  # it is there, and says nothing
        server.wait_for(lambda: server.get("/health").status == 503)
        server.wait_for(lambda: server.get("/ready").status == 200 and server.get("/health").status == 200
                        and server.metric("engine_starts_total") == 2)
        with server.open(ask(5, max_tokens=9)) as stream:
            assert_whole(stream, 5, 9)


# ---- one request is at fault ----------------------------------------------------------------------------


def test_a_request_that_makes_a_step_fail_takes_down_itself_only():
    faults = {"100": "raise@3", "101": "raise@0", "102": "raise@5"}
    with scripted(pace=0.005, fault_of=faults, gather=15) as server:
        pid = server.engine_pid()
        good = {seed: server.open(ask(seed, max_tokens=30)) for seed in range(12)}
        bad = {seed: server.open(ask(seed)) for seed in (100, 101)}
        reply = server.post(CHAT, {"messages": HELLO, "seed": 102})
        assert (reply.status, reply.code) == (500, "generation_failed")
        assert "the model failed on this request" in reply.json["error"]["message"]
        for seed, stream in bad.items():
            assert_cut(stream, seed, "the model failed on this request", "generation_failed")
        for seed, stream in good.items():
            assert_whole(stream, seed, 30)
        assert server.engine_pid() == pid and server.metric("engine_starts_total") == 1
        server.wait_for(lambda: server.metric("num_requests_running") == 0)


# ---- too much -------------------------------------------------------------------------------------------


def test_a_full_queue_is_429_with_retry_after():
    with scripted("--max-running", "1", "--max-queued", "2", pace=0.005) as server:
        with server.open(ask(1)) as first:
            wait_for_texts(first, 1)
            queued = [server.open(ask(seed, max_tokens=3)) for seed in (2, 3)]
            server.wait_for(lambda: server.metric("num_requests_waiting") == 2)
            for stream in (True, False):
                reply = server.post(CHAT, {"messages": HELLO, "stream": stream})
                assert (reply.status, reply.json["error"]["type"], reply.code) == \
                    (429, "rate_limit_error", "queue_full")
                assert re.fullmatch("[1-9][0-9]*", reply.fields["retry-after"])
            wait_for_texts(first, 20)  # whom that does not concern
        for seed, stream in zip((2, 3), queued):
            assert_whole(stream, seed, 3)
