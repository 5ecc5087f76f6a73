"""server.worker as a process, from the other end of its pipe."""

import json
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from llama.engine.request import PromptEvent, TokenEvent
from server.process import EngineProcess
from server.wire import EngineSpec
from tests.commands.small import ALPHABET, EOT, make_checkpoint
from tests.server.scripted import expected, request, spec, token
from tests.server.test_supervisor import PATIENCE, is_alive, wait_until


@contextmanager
def worker(first=("ready",), **options):
    """A started process, its first message but for heartbeats read."""
    process = EngineProcess(spec(**options))
    try:
        message = next_message(process)
        assert message[:len(first)] == first
        yield process
    finally:
        process.kill()
        process.end(PATIENCE)


def next_message(process, kind=None):
    """The next message; beats are passed over unless asked for."""
    while True:
        message = process.receive(PATIENCE)
        assert message is not None, "no message came"
        if message[0] == kind or kind is None and message[0] != "beat":
            return message


def steps(process, until):
    """The events of each message, up to the one that brings an event for which `until` holds."""
    batches = []
    while not (batches and any(map(until, batches[-1]))):
        kind, events, seconds = next_message(process)
        assert kind == "events" and seconds >= 0
        batches.append(events)
    return batches


def is_end_of(name):
    return lambda event: event.request_id == name and getattr(event, "finish_reason", None) is not None


def test_one_message_a_step():
    one, other = request("one", max_tokens=4, n=2), request("other", max_tokens=7)
    with worker() as process:
        process.send(("submit", one, other))
        batches = steps(process, is_end_of("other"))
    assert len(batches) == 7
    events = [event for batch in batches for event in batch]
    assert [event.request_id for event in events if isinstance(event, PromptEvent)] == ["one", "other"]
    for asked, index in ((one, 0), (one, 1), (other, 0)):
        assert [event for event in events if isinstance(event, TokenEvent)
                and (event.request_id, event.index) == (asked.id, index)] == expected(asked)[1][index]


def test_a_sign_of_life_while_loading_and_in_a_long_step():
    process = EngineProcess(spec(load_seconds=1.2, faults={"slow": "hang@1"}))
    try:
        assert process.receive(PATIENCE) == ("beat", 0.0, 0.0)
        assert next_message(process)[0] == "ready"
        process.send(("submit", request("slow")))
        assert len(next_message(process)[1]) == 2
        beats = [next_message(process, "beat") for _ in range(3)]
        assert 0 <= beats[0][1] < beats[1][1] < beats[2][1]
        assert beats[2][2] == 1 / 64
    finally:
        process.kill()
        process.end(PATIENCE)


def test_a_cancel_reaches_the_engine_before_the_next_step():
    with worker(pace=0.15) as process:
        process.send(("submit", request("a", max_tokens=1000), request("b", max_tokens=6), request("c", n=3)))
        next_message(process)
        process.send(("cancel", "a", None))  # while the second step is under way
        process.send(("cancel", "c", 1))
        first, *others = steps(process, is_end_of("b"))
    assert {event.request_id for event in first} >= {"b", "c"}
    assert [{(event.request_id, event.index) for event in batch} for batch in others] == [
        *[{("b", 0), ("c", 0), ("c", 2)}] * 3, {("b", 0)}]


def test_what_the_engine_refuses_comes_back_at_once():
    with worker(refuse=["bad"]) as process:
        process.send(("submit", request("bad", n=2)))
        assert next_message(process)[:2] == ("events", [
            TokenEvent("bad", index, None, finish_reason="error", error="bad is refused", field="prompt")
            for index in range(2)])
        process.send(("submit", request("too-many")))
        assert next_message(process)[1][0].error == "too much waits"
        process.send(("submit", request("good", max_tokens=1)))
        assert len(steps(process, is_end_of("good"))) == 1


def test_a_culprit_ends_with_an_error_for_each_sample_that_has_not():
    bad = request("bad", n=3)
    with worker(faults={"bad": "raise@2"}, pace=0.1) as process:
        process.send(("submit", bad, request("good", max_tokens=8)))
        next_message(process)
        process.send(("cancel", "bad", 1))
        batches = steps(process, is_end_of("good"))
    assert len(batches) == 7
    *_, first, second = [event for batch in batches for event in batch if event.request_id == "bad"]
    why = "the model failed on this request: RuntimeError: bad cannot be computed"
    assert [first, second] == [
        TokenEvent("bad", index, None, finish_reason="error", error=why) for index in (0, 2)]
    assert [event.token_id for batch in batches for event in batch if event.request_id == "good"] == [
        token(request("good"), 0, position) for position in range(1, 8)]


@pytest.mark.parametrize(("options", "sentence"), [
    ({"faults": {"bad": "defect@0"}}, "ZeroDivisionError: the books are wrong"),
    ({"broken_after": 0}, "the engine cannot compute anything any more: RuntimeError: the device is gone"),
])
def test_an_engine_that_cannot_go_on_says_why_and_ends(options, sentence, capfd):
    with worker(**options) as process:
        process.send(("submit", request("bad")))
        assert next_message(process) == ("failed", sentence)
        assert process.end(PATIENCE) == "it ended with exit status 1"
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(("options", "sentence", "traceback"), [
    ({"load_error": "config.json: hidden_size is 0"}, "config.json: hidden_size is 0", False),
    ({"odd": 1}, "TypeError: ScriptedEngine.__init__() got an unexpected keyword argument 'odd'", True),
])
def test_an_engine_that_cannot_be_loaded_says_why_and_ends(options, sentence, traceback, capfd):
    with worker(first=("failed", sentence), **options) as process:
        assert process.end(PATIENCE) == "it ended with exit status 1"
    assert ("Traceback" in capfd.readouterr().err) == traceback  # for what nobody thought of


def test_signals_that_address_everybody_are_left_to_the_front():
    with worker(pace=0.01) as process:
        process.send(("submit", request("a", max_tokens=30)))
        next_message(process)
        for everybody in (signal.SIGINT, signal.SIGTERM):
            os.kill(process.pid, everybody)
        assert steps(process, is_end_of("a"))
        assert os.getpgid(process.pid) == process.pid  # nor does a terminal's Ctrl-C come so far


@pytest.mark.parametrize("where", ["idle", "in a step", "between steps", "loading"])
def test_it_ends_when_the_pipe_does(where):
    process = EngineProcess(spec(load_seconds=3600 if where == "loading" else 0, faults={"slow": "hang@1"}))
    try:
        if where != "loading":
            assert next_message(process)[0] == "ready"
        if where in ("in a step", "between steps"):
            process.send(("submit", request("slow" if where == "in a step" else "a", max_tokens=10**9)))
            next_message(process)
        process._connection.close()
        wait_until(lambda: not is_alive(process.pid))
        assert process.end(PATIENCE) == "it ended with exit status 0"
    finally:
        process.kill()


def test_what_is_sent_to_an_engine_that_has_ended_is_nobody_s_trouble():
    with worker() as process:
        process.kill()
        wait_until(lambda: not is_alive(process.pid))
        process.send(("submit", request("a", prompt=range(100_000))))
        assert process.end(0) == "it was killed by SIGKILL, as the system does when memory runs out"
        process.send(("cancel", "a", None))


def test_a_real_checkpoint(tmp_path):
    """The default factory: what is loaded, and how, is as it was asked for, and it computes."""
    make_checkpoint(tmp_path)
    options = {"max_context": 200, "kv_cache_bytes": 10 * 16 * 64, "limits": {"max_running": 3}}
    process = EngineProcess(EngineSpec(str(tmp_path), options, threads=2))
    try:
        kind, loaded = next_message(process)
        assert kind == "ready"
        assert (loaded.max_context, loaded.max_running) == (160, 3)  # ten blocks of sixteen positions
        assert loaded.details == {"directory": str(tmp_path), "dtype": "float32", "device": "cpu",
                                  "cache_tokens": 160, "threads": 2}
        process.send(("submit", request("alphabet", prompt=b"\n", max_tokens=100)))
        events = [event for batch in steps(process, is_end_of("alphabet")) for event in batch]
    finally:
        process.kill()
        process.end(PATIENCE)
    assert [event.token_id for event in events if isinstance(event, TokenEvent)] == [*ALPHABET.encode(), EOT]
    assert events[-1].finish_reason == "stop"


def test_a_real_checkpoint_that_is_none(tmp_path):
    make_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    process = EngineProcess(EngineSpec(str(tmp_path)))
    try:
        kind, sentence = next_message(process)
        assert kind == "failed"
        assert "model.safetensors" in sentence and "Error:" not in sentence
    finally:
        process.kill()
        process.end(PATIENCE)


def test_waiting_for_work_costs_nothing():
    with worker() as process:
        process.send(("submit", request("a", max_tokens=1)))
        steps(process, is_end_of("a"))
        before = cpu_ticks(process.pid)
        time.sleep(0.5)
        assert cpu_ticks(process.pid) - before <= 5  # hundredths of a second; a busy wait takes fifty


def cpu_ticks(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
