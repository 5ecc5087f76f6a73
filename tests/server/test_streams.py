"""Server-sent events over real sockets: each at once, bounded, and never whole by mistake."""

import json
import os
import select
import signal
import threading
from contextlib import contextmanager
from queue import SimpleQueue

import pytest

from server.http.transport import ClientGoneError
from tests.server.live import CONTEXT, listening, serving, tell, wait_until
from tests.server.live import small as small
from tests.server.raw import PATIENCE, chat, get

SHORT = 0.15  # a deadline to be waited for
KIB = 1024
EVENT = b'{"text":"' + b"x" * 4 * KIB + b'"}'


@contextmanager
def telling(**limits):
    """A site that does with the streams at /stream what it is told, step by step; the Steps."""
    steps = SimpleQueue()

    def handle(exchange):
        if exchange.head.path != "/stream":
            return tell(exchange)
        stream = exchange.stream()
        stream.push()  # the head, for which a test waits
        while (step := steps.get(timeout=PATIENCE)) is not None:
            step(stream)

    with listening(handle, **limits) as site:
        yield site, steps


def send(*events):
    return lambda stream: stream.send(events)


def end(stream):
    stream.end()


# ---- on the wire -----------------------------------------------------------------------------------------


def test_every_event_is_on_its_way_before_the_next_is_made():
    with telling() as (site, steps), site.open() as client:
        head = client.send(get("/stream")).head()
        assert head.status == 200
        assert {name: value for name, value in head.fields.items() if name not in ("date", "server")} == {
            "content-type": "text/event-stream", "cache-control": "no-cache", "x-accel-buffering": "no",
            "transfer-encoding": "chunked"}
        for number in range(20):
            steps.put(send(b"%d" % number))
            assert client.chunk() == b"data: %d\n\n" % number
        steps.put(send(b"a", b"b"))
        assert client.chunk() == b"data: a\n\ndata: b\n\n"  # what comes together goes together
        steps.put(lambda stream: stream.beat())
        assert client.chunk().startswith(b":")
        for step in (send(), end, None):  # no event is no chunk, which would be the last
            steps.put(step)
        assert client.chunk() == b"" and not client.received


def test_what_is_kept_goes_with_what_comes_next():
    with telling() as (site, steps), site.open() as client:
        client.send(get("/stream")).head()
        kept = threading.Event()
        for step in (lambda stream: stream.keep([b"a", b"b"]), lambda stream: stream.keep([]), lambda _: kept.set()):
            steps.put(step)
        assert kept.wait(PATIENCE) and not select.select([client.socket], [], [], 0)[0]
        steps.put(send(b"c"))
        assert [client.chunk(), client.chunk()] == [b"data: a\n\ndata: b\n\n", b"data: c\n\n"]
        for step in (lambda stream: stream.keep([b"d"]), lambda stream: stream.push(), end, None):
            steps.put(step)
        assert [client.chunk(), client.chunk()] == [b"data: d\n\n", b""]


def test_the_connection_serves_on_after_a_stream():
    with telling() as (site, steps), site.open() as client:
        for _ in range(3):
            for step in (send(b"a"), send(b"b"), end, None):
                steps.put(step)
            assert client.ask(get("/stream")).events == [b"a", b"b"]
            assert client.ask(get("/other")).json["path"] == "/other"


@pytest.mark.parametrize(("version", "fields", "in_chunks"), [
    ("1.0", [], False), ("1.0", ["Connection: keep-alive"], False), ("1.1", ["Connection: close"], True)])
def test_streams_that_end_with_their_connection(version, fields, in_chunks):
    with telling() as (site, steps), site.open() as client:
        for step in (send(b"a"), send(b"b"), end, None):
            steps.put(step)
        answer = client.ask(get("/stream", *fields, version=version))
        assert answer.fields["connection"] == "close" and (answer.chunks is not None) is in_chunks
        assert answer.events == [b"a", b"b"]
        assert client.rest() == b""


def fail(stream):
    raise ZeroDivisionError("a defect")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(("breaking", "events"), [
    (lambda stream: stream.break_off(b'{"error":{}}'), [b"a", b'{"error":{}}']), (fail, [b"a"])])
def test_what_breaks_off_looks_broken(version, breaking, events):
    with telling() as (site, steps), site.open() as client:
        for step in (send(b"a"), breaking, None):
            steps.put(step)
        answer = client.ask(get("/stream", version=version))
        assert answer.events == events
        assert version == "1.0" or not answer.is_whole
        assert client.rest() == b""  # and no other request is served


# ---- who does not read -----------------------------------------------------------------------------------


class Flood:
    """Sends EVENT again and again until it must not; remembers how often, and how much was left waiting."""

    def __init__(self):
        self.count = self.most_pending = 0
        self.reason = None

    def __call__(self, stream):
        try:
            while True:
                self.most_pending = max(self.most_pending, len(stream._transport._pending))
                stream.send([EVENT])
                self.count += 1
        except ClientGoneError as error:
            self.reason = str(error)
            raise


def test_a_slow_reader_is_bounded_and_cut_alone():
    flood = Flood()
    with telling() as (site, steps), site.open() as other, site.open(room=4 * KIB) as client:
        client.send(get("/stream")).head()
        steps.put(flood)
        wait_until(lambda: flood.reason)
        assert flood.reason == "it reads too slowly"
        assert 128 * KIB < flood.most_pending <= 256 * KIB  # beside what the system holds, which has a bound too
        assert other.ask(get("/other")).status == 200
        wait_until(lambda: site.connections == 1)
        received = client.rest()
        assert received.count(b"data: ") <= flood.count and not received.endswith(b"0\r\n\r\n")


def fill(stream):
    while not stream.has_pending:
        stream.send([EVENT])


def test_a_stalled_reader_is_cut_although_little_is_sent():
    reasons = []

    def push(stream):
        try:
            while True:
                stream.push()
        except ClientGoneError as error:
            reasons.append(str(error))
            raise

    with telling(stall_seconds=SHORT) as (site, steps), site.open(room=4 * KIB) as client:
        client.send(get("/stream")).head()
        steps.put(fill)
        steps.put(push)
        wait_until(lambda: site.connections == 0)
        assert reasons == ["it has stopped reading"]


@pytest.mark.parametrize("ending", [end, lambda stream: stream.break_off(b"{}")])
def test_a_stalled_reader_is_not_waited_for_at_the_end(ending):
    with telling(stall_seconds=SHORT) as (site, steps), site.open(room=4 * KIB) as client:
        client.send(get("/stream")).head()
        for step in (fill, ending, None):
            steps.put(step)
        wait_until(lambda: site.connections == 0)


def test_what_a_reader_left_is_sent_when_it_reads_again():
    with telling() as (site, steps), site.open(room=4 * KIB) as client:
        client.send(get("/stream")).head()

        def push(stream):
            while stream.has_pending:
                stream.push()

        for step in (fill, push, send(b"last"), end, None):
            steps.put(step)
        chunks = []
        while chunk := client.chunk():
            chunks.append(chunk)
        assert set(chunks[:-1]) == {b"data: " + EVENT + b"\n\n"} and chunks[-1] == b"data: last\n\n"


def test_an_event_may_be_larger_than_what_may_wait():
    """As with the log probabilities of a long prompt: whoever reads is not cut for it."""
    large = b"y" * KIB * KIB
    with telling() as (site, steps), site.open(room=4 * KIB) as client:
        for step in (send(b"a"), send(large), send(b"b"), end, None):
            steps.put(step)
        assert client.ask(get("/stream")).events == [b"a", large, b"b"]


# ---- with an engine --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hold(tmp_path_factory):
    """While this file is there, the engine is in the middle of a step."""
    return tmp_path_factory.mktemp("hold") / "hold"


@pytest.fixture(scope="module")
def served(small, hold):
    with serving(small, heartbeat_seconds=0.02, limits={"pending": 16 * KIB},
                 engine={"pace": 0.0005, "hold": str(hold)}) as served:
        yield served


def text(events):
    """What a stream says; its last event must be [DONE], and only that."""
    assert events.index(b"[DONE]") == len(events) - 1
    return "".join(json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1])


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_chat_is_a_stream_of_its_tokens(served, version):
    with served.open() as client:
        answer = client.ask(chat(stream=True, max_tokens=30, version=version))
        assert text(answer.events) == "abcdefghijklmnopqrstuvwxyzabcd"
        assert answer.fields["x-request-id"].startswith("chat-") and answer.is_whole
        if version == "1.1":
            assert text(client.ask(chat(stream=True, max_tokens=3)).events) == "abc"


def test_a_stream_shows_that_it_lives(served, hold):
    hold.touch()
    try:
        with served.open() as client:
            client.send(chat(stream=True, max_tokens=3)).head()
            assert json.loads(client.chunk().removeprefix(b"data: "))["choices"][0]["delta"] == {"role": "assistant"}
            beats = [client.chunk() for _ in range(3)]  # while queued and while the prompt is computed
            assert set(beats) == {b": still there\n\n"}
            hold.unlink()
            rest = []
            while chunk := client.chunk():
                rest.append(chunk)
            assert b"".join(rest).endswith(b"data: [DONE]\n\n")
    finally:
        hold.unlink(missing_ok=True)


def test_a_stream_whose_tokens_say_nothing_yet_shows_that_it_lives(served):
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    with served.open() as client:
        client.send(chat(stream=True, max_tokens=500, stop=f"{alphabet * 30}!")).head()  # held back, to the end
        assert b'"role"' in client.chunk()
        assert client.chunk() == b": still there\n\n"
        rest = client.take_until(b"[DONE]")
        assert rest.count(b'"content":') == 1 and alphabet.encode() in rest


def test_a_reader_too_slow_for_its_text_is_cancelled_alone(served):
    with served.open() as other, served.open(room=4 * KIB) as client:
        other.send(chat(stream=True, max_tokens=CONTEXT - 100)).head()
        client.send(chat(stream=True, max_tokens=CONTEXT - 100, n=4)).head()
        served.wait_for(running=2)
        while served.supervisor.snapshot()["running"] == 2:
            assert other.chunk()  # whom that does not concern
        assert served.metric("request_failure_total", reason="cancelled") == 1
        assert other.chunk()
    served.wait_for(running=0)
    with served.open() as client:
        assert text(client.ask(chat(stream=True, max_tokens=3)).events) == "abc"


def test_a_stream_whose_engine_is_lost_ends_with_one_error(served):
    with served.open() as client:
        client.send(chat(stream=True, max_tokens=CONTEXT - 100)).head()
        client.take_until(b'"content":"c"')
        os.kill(served.supervisor.snapshot()["engine_pid"], signal.SIGKILL)
        received = client.rest()
        *chunks, error, nothing = received.split(b"\n\n\r\n")
        assert nothing == b"" and b"[DONE]" not in received and b'"error"' not in b"".join(chunks)
        error = json.loads(error.partition(b"data: ")[2])["error"]
        assert error["code"] == "engine_lost" and "SIGKILL" in error["message"]
    wait_until(lambda: served.supervisor.state == "ready")
    assert text(served.ask(chat(stream=True, max_tokens=3)).events) == "abc"
