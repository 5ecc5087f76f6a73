"""server.tickets without processes: what an engine says, and who hears it."""

import pytest

from llama.engine.request import PromptEvent, TokenEvent
from server.tickets import Lost, Tickets
from server.wire import EngineSpec, Loaded
from tests.server.scripted import request


class Pipe:
    """Where an engine would be: what was sent to it."""

    def __init__(self):
        self.sent = []

    def send(self, message):
        self.sent.append(message)


@pytest.fixture
def pipe():
    return Pipe()


@pytest.fixture
def tickets(pipe):
    tickets = Tickets(EngineSpec())
    tickets.open(pipe, Loaded(1000, 64))
    return tickets


def end(name, index=0):
    return TokenEvent(name, index, 7, finish_reason="length")


def test_requests_go_down_together_and_cancels_one_by_one(tickets, pipe):
    one, other = request("one", n=2), request("other")
    ticket = tickets.submit([one, other])
    ticket.cancel("one", 1)
    ticket.cancel("one", 1)  # not twice
    ticket.cancel()
    ticket.cancel()
    assert pipe.sent == [("submit", one, other), ("cancel", "one", 1), ("cancel", "one", None),
                         ("cancel", "other", None)]
    assert ticket.get() == []


def test_a_step_is_one_batch(tickets):
    ticket, stranger = tickets.submit([request("a"), request("b")]), tickets.submit([request("c")])
    step = [PromptEvent("a"), TokenEvent("a", 0, 1), PromptEvent("c"), TokenEvent("c", 0, 2),
            PromptEvent("b")]
    tickets.deliver(step, began=1.0)
    tickets.deliver([TokenEvent("b", 0, 3)], began=2.0)
    assert ticket._inbox.qsize() == 2
    assert ticket.get() == [step[0], step[1], step[4], TokenEvent("b", 0, 3)]  # all there is, in order
    assert stranger.get() == step[2:4]
    assert (ticket.began, stranger.began) == (1.0, 1.0)
    assert ticket.get(timeout=0) is None


def test_a_ticket_is_over_when_the_last_sample_of_the_last_request_is(tickets):
    ticket = tickets.submit([request("a", n=2), request("b")])
    for event in (end("a", 1), end("b"), end("a", 0)):
        assert ticket.get(timeout=0) is None
        tickets.deliver([event], 0.0)
        assert ticket.get() == [event]
    assert ticket.get() == []
    assert len(tickets) == 0


def test_events_that_nobody_wants_any_more_are_dropped(tickets):
    ticket = tickets.submit([request("a", n=3), request("b")])
    tickets.deliver([TokenEvent("a", 0, 1)], 0.0)
    ticket.cancel("a", 0)
    ticket.cancel("b")
    # The engine was in the middle of a step.
    tickets.deliver([TokenEvent("a", 0, 2), TokenEvent("a", 1, 3), PromptEvent("b"), end("a", 0), end("b"),
                     TokenEvent("unknown", 0, 1)], 0.0)
    assert ticket.get() == [TokenEvent("a", 0, 1), TokenEvent("a", 1, 3)]
    tickets.deliver([end("a", 1), end("a", 2), end("a", 2)], 0.0)
    assert list(ticket) == [end("a", 1), end("a", 2)]
    assert tickets.counts()["generated_tokens"] == 4


def test_counts(tickets):
    tickets.submit([request("a", prompt=range(40)), request("b", prompt=range(9))])
    assert tickets.counts() == {"running": 0, "waiting": 2, "prompt_tokens": 0, "cached_tokens": 0,
                                "generated_tokens": 0}
    tickets.deliver([PromptEvent("a", num_cached=32)], 0.0)
    tickets.deliver([PromptEvent("a")], 0.0)  # further log probabilities of the same prompt
    tickets.deliver([TokenEvent("a", 0, 5), TokenEvent("b", 0, None, finish_reason="error", error="!")], 0.0)
    assert tickets.counts() == {"running": 1, "waiting": 0, "prompt_tokens": 40, "cached_tokens": 32,
                                "generated_tokens": 1}


def test_losing_an_engine_ends_every_ticket_once(tickets, pipe):
    over, some, none = (tickets.submit([request(name, n=2)]) for name in ("over", "some", "none"))
    tickets.deliver([end("over", 0), end("over", 1), TokenEvent("some", 0, 1), end("some", 1)], 0.0)
    tickets.lose("gone")
    assert list(over) == [end("over", 0), end("over", 1)]
    assert list(some) == [TokenEvent("some", 0, 1), end("some", 1), Lost("gone")]
    assert list(none) == [Lost("gone")]
    num_sent = len(pipe.sent)
    some.cancel()
    tickets.lose("again")
    tickets.deliver([end("some", 0)], 0.0)
    assert some.get() == [] and some._inbox.empty()
    assert tickets.submit([request("late")]) is None
    assert len(pipe.sent) == num_sent and len(tickets) == 0
    other = Pipe()
    tickets.open(other, Loaded(1000, 64))
    tickets.submit([request("some")])  # the name is free again
    assert len(other.sent) == 1
