"""server.supervisor with real processes and a scripted engine: whatever happens, every ticket ends, once."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from llama.engine.request import PromptEvent, QueueFullError, RequestError, TokenEvent
from server.supervisor import EngineUnavailableError, Lost, Supervisor
from tests.server.scripted import expected, request, spec, token

PATIENCE = 30  # seconds until a wait is a failure; never what is measured


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def is_alive(pid):
    """Whether there is such a process; a zombie is none, but no child of ours may be one."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@contextmanager
def running(ready=True, **options):
    """A started supervisor, and its states so far. Afterwards it is stopped, and its engine is gone."""
    states = []
    supervisor = Supervisor(spec(**options), lambda *state: states.append(state))
    supervisor.start()
    try:
        if ready:
            wait_until(lambda: supervisor.state == "ready")
        yield supervisor, states
    finally:
        pid = supervisor.snapshot()["engine_pid"]
        supervisor.stop(0)
    assert supervisor.state == "draining"
    assert pid is None or not Path(f"/proc/{pid}").exists()  # not even as a zombie


def sorted_out(events):
    """Prompt events, and token events by request and sample; no Lost among them."""
    prompts, tokens = [], {}
    for event in events:
        if isinstance(event, PromptEvent):
            prompts.append(event)
        else:
            tokens.setdefault((event.request_id, event.index), []).append(event)
    return prompts, tokens


def assert_whole(ticket_events, requests):
    prompts, tokens = sorted_out(ticket_events)
    assert sorted(event.request_id for event in prompts) == sorted(one.id for one in requests)
    assert tokens == {(one.id, index): events
                      for one in requests for index, events in expected(one)[1].items()}


# ---- asking ----------------------------------------------------------------------------------------------


def test_requests_come_out_whole_and_in_order():
    requests = [request("a", max_tokens=7, n=3), request("b", max_tokens=2), request("c", max_tokens=40)]
    with running() as (supervisor, states):
        together, alone = supervisor.submit(requests[:2]), supervisor.submit(requests[2:])
        assert_whole(list(together), requests[:2])
        assert_whole(list(alone), requests[2:])
        assert together.get() == [] == together.get(timeout=0)  # over is over
        snapshot = supervisor.snapshot()
        counts = {"running": 0, "waiting": 0, "prompt_tokens": 9, "cached_tokens": 0, "num_engines": 1,
                  "generated_tokens": 7 * 3 + 2 + 40}
        assert snapshot.items() >= counts.items()
        assert snapshot["num_steps"] >= 40
        assert is_alive(snapshot["engine_pid"])
        assert snapshot["heartbeat_age"] < PATIENCE
    assert [state for state, _ in states] == ["loading", "ready", "draining"]


def test_a_ticket_knows_when_it_began():
    with running(max_running=1, pace=0.01) as (supervisor, _):
        arrived = time.monotonic()
        first, second = (supervisor.submit([request(name)]) for name in ("first", "second"))
        assert second.began is None
        list(first)
        first_ended = time.monotonic()
        list(second)
        assert arrived <= first.began <= first_ended - 0.01  # not when its first step ended
        assert first.began < second.began


def test_get_waits_no_longer_than_it_is_told():
    with running(pace=0.3) as (supervisor, _):
        ticket = supervisor.submit([request("a", max_tokens=2)])
        assert ticket.get(timeout=0.001) is None
        assert_whole(list(ticket), [request("a", max_tokens=2)])


def test_start_returns_while_the_model_loads():
    with running(ready=False, load_seconds=0.3) as (supervisor, states):
        with pytest.raises(EngineUnavailableError, match="the model is loading") as caught:
            supervisor.submit([request("early")])
        assert caught.value.state == "loading" == supervisor.state
        assert supervisor.loaded is None
        wait_until(lambda: supervisor.state == "ready")
        assert supervisor.loaded.max_running == 64
        assert_whole(list(supervisor.submit([request("late")])), [request("late")])


def test_what_cannot_be_served_is_refused_at_the_door():
    with running(max_context=20, max_running=4) as (supervisor, _):
        with pytest.raises(RequestError, match="^the prompt's 3 tokens and max_tokens 18 together exceed "
                                               "the 20 tokens that the engine holds; lower one of them$"
                           ) as caught:
            supervisor.submit([request("ok"), request("long", max_tokens=18)])
        assert caught.value.field == "max_tokens"
        with pytest.raises(RequestError) as caught:
            supervisor.submit([request("long", prompt=range(20), max_tokens=1)])
        assert caught.value.field == "prompt"
        with pytest.raises(RequestError, match="^n is 5, but at most 4 sequences run at once$"):
            supervisor.submit([request("many", n=5)])
        assert supervisor.snapshot()["waiting"] == 0  # all or none
        longest = request("long", max_tokens=17)
        assert_whole(list(supervisor.submit([longest])), [longest])


def test_the_queue_has_a_bound_of_requests():
    with running(max_running=1, pace=0.02, max_queued_requests=2) as (supervisor, _):
        first = supervisor.submit([request("first", max_tokens=100_000)])
        first.get()  # it has begun, and waits no longer
        second = supervisor.submit([request("second"), request("third")])
        assert supervisor.snapshot()["waiting"] == 2
        with pytest.raises(QueueFullError, match="^2 requests wait already; try again later$"):
            supervisor.submit([request("fourth")])
        second.cancel("second")
        fourth = supervisor.submit([request("fourth")])
        first.cancel()
        assert_whole(list(second), [request("third")])
        assert_whole(list(fourth), [request("fourth")])


def test_the_queue_has_a_bound_of_tokens():
    with running(max_running=1, pace=0.02, max_queued_tokens=10) as (supervisor, _):
        first = supervisor.submit([request("first", max_tokens=100_000)])
        first.get()
        large = supervisor.submit([request("large", prompt=range(11))])  # alone it may be of any length
        with pytest.raises(QueueFullError, match="^prompts of 11 tokens wait already; try again later$"):
            supervisor.submit([request("small")])
        large.cancel()
        supervisor.submit([request("medium", prompt=range(9))])
        supervisor.submit([request("one more", prompt=[1])])
        with pytest.raises(QueueFullError, match="^prompts of 10 tokens"):
            supervisor.submit([request("too much", prompt=[1])])


def test_what_the_engine_refuses_ends_in_an_error_event():
    with running(refuse=["bad"]) as (supervisor, _):
        events = list(supervisor.submit([request("bad", n=2), request("good")]))
        errors = [event for event in events if event.request_id == "bad"]
        assert errors == [TokenEvent("bad", index, None, finish_reason="error", error="bad is refused", field="prompt")
                          for index in range(2)]
        assert_whole([event for event in events if event.request_id == "good"], [request("good")])
        assert list(supervisor.submit([request("too-many")]))[0].error == "too much waits"


def test_cancelling():
    with running(pace=0.005) as (supervisor, _):
        ticket = supervisor.submit([request("a", max_tokens=100_000, n=3), request("b", max_tokens=60)])
        ticket.get()
        ticket.cancel("a", 1)
        ticket.cancel("a", 0)
        ticket.get()
        _, tokens = sorted_out(ticket.get())
        assert ("a", 2) in tokens and not {("a", 0), ("a", 1)} & tokens.keys()
        ticket.cancel("a", 1)  # has ended already, like these
        ticket.cancel("unknown")
        ticket.cancel("a")
        _, tokens = sorted_out(list(ticket))
        assert tokens["b", 0][-1].finish_reason == "length"
        assert supervisor.snapshot()["running"] == 0
        whole = supervisor.submit([request("c", max_tokens=100_000), request("d", max_tokens=100_000)])
        stranger = supervisor.submit([request("e", max_tokens=3)])
        stranger.cancel("c")  # is not its own
        reader = threading.Thread(target=lambda: list(whole))
        reader.start()
        assert_whole(list(stranger), [request("e", max_tokens=3)])
        assert supervisor.snapshot()["running"] == 2
        whole.cancel()
        reader.join(PATIENCE)  # who waits in get is woken
        assert not reader.is_alive()
        assert whole.get() == []


def test_a_thousand_tickets_at_once():
    requests = {one.id: one for one in (
        request(f"r{number}", max_tokens=1 + number % 17, prompt=(number,), n=1 + number % 2)
        for number in range(1000))}
    got = {}

    def ask(names):
        tickets = {name: supervisor.submit([requests[name]]) for name in names}
        for name, ticket in tickets.items():
            got[name] = list(ticket)

    with running(max_running=2000) as (supervisor, _):
        unread = supervisor.submit([request("unread", max_tokens=2000)])  # who does not read holds nobody up
        threads = [threading.Thread(target=ask, args=(list(requests)[first::20],)) for first in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert got.keys() == requests.keys()
        for name, events in got.items():
            assert_whole(events, [requests[name]])
        assert_whole(list(unread), [request("unread", max_tokens=2000)])


def test_there_is_one_thread_whatever_the_number_of_tickets():
    before = threading.active_count()
    with running() as (supervisor, _):
        tickets = [supervisor.submit([request(f"r{number}")]) for number in range(50)]
        assert threading.active_count() == before + 1
        assert all(len(list(ticket)) == 6 for ticket in tickets)


# ---- an engine that is lost ------------------------------------------------------------------------------


def test_killed_twenty_times_in_the_middle():
    with running(pace=0.002, retry_seconds=0.01) as (supervisor, states):
        for kill in range(20):
            wait_until(lambda: supervisor.state == "ready")
            requests = [request(f"{kill}-{number}", max_tokens=length, n=1 + number % 2)
                        for number, length in enumerate([1, 2, 3, 5, 8, 13, 100_000, 100_000])]
            tickets = [supervisor.submit([one]) for one in requests]
            first = tickets[-1].get()
            time.sleep(0.002 * (kill % 5))
            os.kill(supervisor.snapshot()["engine_pid"], signal.SIGKILL)
            killed = time.monotonic()
            got = [list(ticket) for ticket in tickets]
            assert time.monotonic() - killed < 2  # the specification's own number
            got[-1] = first + got[-1]
            for one, events in zip(requests, got):
                lost = [event for event in events if isinstance(event, Lost)]
                if not lost:
                    assert_whole(events, [one])
                    continue
                assert lost == events[-1:] and "killed by SIGKILL" in lost[0].message
                for (_, index), tokens in sorted_out(events[:-1])[1].items():
                    right = [token(one, index, position) for position in range(len(tokens))]
                    assert [event.token_id for event in tokens] == right
            assert lost
        wait_until(lambda: supervisor.state == "ready")
        assert_whole(list(supervisor.submit([request("after")])), [request("after")])
        assert supervisor.snapshot()["num_engines"] == 21
    assert [state for state, _ in states] == [
        "loading", "ready", *["lost", "loading", "ready"] * 20, "draining"]


def test_an_engine_that_hangs_in_a_step_is_lost():
    with running(faults={"bad": "hang@1"}, step_seconds=0.6) as (supervisor, states):
        [*events, lost] = list(supervisor.submit([request("bad")]))
        assert len(events) == 2
        assert lost == Lost("the engine was lost (it has been busy with one step for 1 seconds) and is being "
                            "started again")
        wait_until(lambda: supervisor.state == "ready")
        assert len(list(supervisor.submit([request("good", max_tokens=1)]))) == 2


def test_an_engine_that_falls_silent_is_lost():
    with running(silent_seconds=1.0, pace=0.01) as (supervisor, _):
        ticket = supervisor.submit([request("a", max_tokens=100_000)])
        ticket.get()
        stopped = supervisor.snapshot()["engine_pid"]
        os.kill(stopped, signal.SIGSTOP)
        assert "it has not answered for" in list(ticket)[-1].message
        wait_until(lambda: supervisor.state == "ready")
        assert not Path(f"/proc/{stopped}").exists()


def test_an_engine_with_a_defect_says_so_and_is_replaced(capfd):
    with running(faults={"bad": "defect@1"}) as (supervisor, _):
        tickets = [supervisor.submit([one]) for one in (request("good", max_tokens=100_000), request("bad"))]
        for ticket in tickets:
            assert list(ticket)[-1] == Lost(
                "the engine was lost (ZeroDivisionError: the books are wrong) and is being started again")
        wait_until(lambda: supervisor.state == "ready")
    assert "Traceback" in capfd.readouterr().err


def test_a_request_that_makes_a_step_fail_takes_down_itself():
    with running(faults={"bad": "raise@2"}, pace=0.001) as (supervisor, _):
        good = [supervisor.submit([request(f"good{number}", max_tokens=30)]) for number in range(5)]
        *events, last = supervisor.submit([request("bad", max_tokens=9)])
        assert len(events) == 3
        why = "the model failed on this request: RuntimeError: bad cannot be computed"
        assert last == TokenEvent("bad", 0, None, finish_reason="error", error=why)
        for number, ticket in enumerate(good):
            assert_whole(list(ticket), [request(f"good{number}", max_tokens=30)])
        assert supervisor.snapshot()["num_engines"] == 1


def test_a_checkpoint_that_cannot_be_loaded_is_the_end_at_once():
    sentence = "model.safetensors has no tensor lm_head.weight"
    with running(ready=False, load_error=sentence) as (supervisor, states):
        wait_until(lambda: supervisor.state == "failed")
        assert supervisor.state_detail == sentence
        with pytest.raises(EngineUnavailableError, match=f"^{sentence}$") as caught:
            supervisor.submit([request("a")])
        assert caught.value.state == "failed"
        wait_until(lambda: not any(thread.name == "engine" for thread in threading.enumerate()))
        assert supervisor.snapshot()["num_engines"] == 1
    assert [state for state, _ in states] == ["loading", "failed", "draining"]


def test_engines_that_never_get_ready_are_given_up(tmp_path):
    options = {"load_kill": str(tmp_path), "max_failures": 3, "retry_seconds": 0.01}
    with running(ready=False, **options) as (supervisor, states):
        wait_until(lambda: supervisor.state == "failed")
        assert supervisor.state_detail == ("the engine failed 3 times in a row, at last so: it was killed by "
                                           "SIGKILL, as the system does when memory runs out")
        assert supervisor.snapshot()["num_engines"] == 3
    assert [state for state, _ in states] == ["loading", "lost"] * 2 + ["loading", "failed", "draining"]


def test_nothing_is_taken_while_an_engine_is_lost(tmp_path):
    trouble = tmp_path / "trouble"
    with running(load_kill=str(trouble), retry_seconds=0.3) as (supervisor, states):
        list(supervisor.submit([request("a")]))
        trouble.touch()
        os.kill(supervisor.snapshot()["engine_pid"], signal.SIGKILL)
        wait_until(lambda: [state for state, _ in states[-2:]] == ["loading", "lost"])
        with pytest.raises(EngineUnavailableError, match="^the engine was lost .* started again$") as caught:
            supervisor.submit([request("b")])
        assert caught.value.state in ("lost", "loading")
        trouble.unlink()
        wait_until(lambda: supervisor.state == "ready")
        assert_whole(list(supervisor.submit([request("b")])), [request("b")])


def test_only_failures_in_a_row_count(tmp_path):
    trouble = tmp_path / "trouble"
    with running(load_kill=str(trouble), max_failures=3, retry_seconds=0.01, pace=0.01) as (supervisor, _):
        for _ in range(3):
            trouble.touch()
            num_before = supervisor.snapshot()["num_engines"]
            ticket = supervisor.submit([request("a", max_tokens=100_000)])
            ticket.get()
            os.kill(supervisor.snapshot()["engine_pid"], signal.SIGKILL)
            wait_until(lambda: supervisor.snapshot()["num_engines"] == num_before + 2)
            trouble.unlink()
            wait_until(lambda: supervisor.state == "ready")


def test_a_loading_error_is_final_only_if_nothing_was_ever_loaded(tmp_path):
    with running(pace=0.01, retry_seconds=0.01, max_failures=2) as (supervisor, states):
        supervisor.spec.options["load_error"] = "the disk is away"
        os.kill(supervisor.snapshot()["engine_pid"], signal.SIGKILL)
        wait_until(lambda: supervisor.state == "failed")
        assert supervisor.state_detail == "the engine failed 2 times in a row, at last so: the disk is away"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_of_its_own_leaves_nobody_waiting(monkeypatch):
    with running(pace=0.01) as (supervisor, _):
        pid = supervisor.snapshot()["engine_pid"]
        ticket = supervisor.submit([request("a", max_tokens=100_000)])
        ticket.get()
        monkeypatch.setattr(supervisor._tickets, "deliver", None)
        assert list(ticket)[-1] == Lost("the engine is not looked after any more: "
                                        "TypeError(\"'NoneType' object is not callable\")")
        assert supervisor.state == "failed"
        assert not Path(f"/proc/{pid}").exists()


# ---- the end ---------------------------------------------------------------------------------------------


def test_stopping_lets_what_runs_end():
    with running(pace=0.01) as (supervisor, states):
        pid = supervisor.snapshot()["engine_pid"]
        tickets = [supervisor.submit([request(f"r{number}", max_tokens=20)]) for number in range(8)]
        stopper = threading.Thread(target=supervisor.stop, args=(PATIENCE,))
        stopper.start()
        wait_until(lambda: supervisor.state == "draining")
        with pytest.raises(EngineUnavailableError, match="^the server is stopping$") as caught:
            supervisor.submit([request("late")])
        assert caught.value.state == "draining"
        for number, ticket in enumerate(tickets):
            assert_whole(list(ticket), [request(f"r{number}", max_tokens=20)])
        stopper.join(PATIENCE)
        assert not is_alive(pid)
    assert [state for state, _ in states] == ["loading", "ready", "draining"]


def test_what_does_not_end_in_time_is_lost():
    with running(pace=0.01) as (supervisor, _):
        tickets = [supervisor.submit([request(f"r{number}", max_tokens=length)])
                   for number, length in enumerate([5, 100_000])]
        supervisor.stop(0.5)
        assert_whole(list(tickets[0]), [request("r0")])
        *events, last = tickets[1]
        assert len(events) > 5 and last == Lost("the server is stopping")


def test_a_second_stop_is_at_once_whatever_the_engine_does():
    with running(faults={"bad": "hang@1"}) as (supervisor, _):
        ticket = supervisor.submit([request("bad")])
        stopper = threading.Thread(target=supervisor.stop, args=(3600,))
        stopper.start()
        wait_until(lambda: supervisor.state == "draining")
        with supervisor._changing:  # as a signal handler may find it
            second = threading.Thread(target=supervisor.stop, args=(0,), daemon=True)
            second.start()
            second.join(PATIENCE)
            assert not second.is_alive()
        stopper.join(PATIENCE)
        assert not stopper.is_alive()
        assert list(ticket)[-1] == Lost("the server is stopping")


@pytest.mark.parametrize("options", [{"load_seconds": 3600}, {"load_kill": "/", "retry_seconds": 3600}])
def test_stopping_while_there_is_no_engine(options, monkeypatch):
    monkeypatch.setattr("server.supervisor.MAX_RETRY_SECONDS", 3600)
    with running(ready=False, **options) as (supervisor, _):
        wait_until(lambda: supervisor.state == ("lost" if "load_kill" in options else "loading"))
        stopper = threading.Thread(target=supervisor.stop, args=(3600,))  # nothing is under way
        stopper.start()
        stopper.join(PATIENCE)
        assert not any(thread.name == "engine" for thread in threading.enumerate())


def test_stopping_what_was_never_started():
    supervisor = Supervisor(spec())
    supervisor.stop(0)
    assert supervisor.state == "draining"


FRONT = """
import sys, time
from server.supervisor import Supervisor
from tests.server.scripted import request, spec
supervisor = Supervisor(spec(faults={"hangs": "hang@1"}, load_seconds=float(sys.argv[2])))
supervisor.start()
while supervisor.snapshot()["engine_pid"] is None or supervisor.state == "loading" and sys.argv[2] == "0":
    time.sleep(0.01)
if sys.argv[1]:
    events = supervisor.submit([request(sys.argv[1])]).get()
    assert len(events) == 2, events
print(supervisor.snapshot()["engine_pid"], *sorted({"torch", "numpy"} & sys.modules.keys()), flush=True)
time.sleep(3600)
"""


@pytest.mark.parametrize(("name", "load_seconds"), [("", "0"), ("hangs", "0"), ("", "3600")])
def test_the_engine_ends_with_a_front_that_is_killed(name, load_seconds):
    """When idle, in a long step, and while loading. And nothing of this brings torch into the front."""
    front = subprocess.Popen([sys.executable, "-c", FRONT, name, load_seconds], cwd=Path(__file__).parents[2],
                             stdout=subprocess.PIPE, text=True)
    [pid] = front.stdout.readline().split()
    assert is_alive(int(pid))
    front.kill()
    front.communicate()
    wait_until(lambda: not is_alive(int(pid)))
