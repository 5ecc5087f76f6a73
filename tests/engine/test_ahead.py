"""Steps enqueued ahead of what the host knows, on a device that keeps the host waiting (see recording.py): the same
tokens as on a CPU that is done at once, whatever happens meanwhile."""

import itertools
import random
import threading
from collections import Counter
from concurrent.futures import wait
from dataclasses import replace

import pytest
import torch

from llama.engine import flight as flight_module
from llama.engine import graphs as graphs_module
from llama.engine import sampler
from llama.engine.engine import Engine
from llama.engine.limits import Limits
from llama.engine.propose import PromptLookup
from llama.engine.request import StepError, TokenEvent
from llama.engine.step import Plan
from server import isolate
from tests.engine.recording import RecordingDevice, watch
from tests.engine.running import TINY, alone, engine_of, run
from tests.engine.simulation import request
from tests.engine.test_constraint import Steps
from tests.engine.test_engine import REQUESTS, assert_same
from tests.model.pairs import hugging_face, ours, random_ids

# Nobody in it whose draws need to know the token before: no penalties.
PLAIN = [one for one in REQUESTS if one.params.repetition_penalty == 1 and not one.params.frequency_penalty] + [
    replace(one, id=f"{one.id} ending", params=replace(one.params, ignore_eos=False, logit_bias={1: 5.0}, seed=place))
    for place, one in enumerate(REQUESTS) if one.params.temperature == 1.0 and not one.params.frequency_penalty]


@pytest.fixture(scope="module")
def model():
    """A tiny one, 4:1 heads."""
    return ours(hugging_face(TINY["8:2"]))


@pytest.fixture(scope="module")
def plain(model):
    """Every request by itself, on the CPU."""
    return alone(model, [*REQUESTS, *PLAIN])


@pytest.fixture
def counts(monkeypatch):
    """How many rows of a step were dropped when it landed."""
    counts = Counter()
    land = flight_module.Flight.land

    def counted(flight, alive):
        landing = land(flight, alive)
        counts["dropped"] += len(flight.plan.scheduled) - len(landing.plan.scheduled)
        counts["amended"] += landing.is_amended
        return landing

    monkeypatch.setattr(flight_module.Flight, "land", counted)
    return counts


def ahead_engine(model, limits, num_blocks, counts, **chosen) -> Engine:
    """An engine on such a device, watched."""
    return watch(engine_of(model, limits, num_blocks, device=RecordingDevice(), **chosen), counts)


def of(plain, requests):
    """The part of a run that is these requests'."""
    names = {one.id for one in requests}
    return replace(plain, samples={key: value for key, value in plain.samples.items() if key[0] in names},
                   reasons={key: value for key, value in plain.reasons.items() if key[0] in names},
                   prompts={key: value for key, value in plain.prompts.items() if key in names} |
                           {name: [] for name in names - plain.prompts.keys()})


# ---- the same tokens ---------------------------------------------------------------------------------------------

WAYS = {
    "batched": (Limits(512), 400, {}, {}),
    "few at once": (Limits(512, max_running=5), 400, {}, {}),
    "chunked": (Limits(512, step_tokens=7, mixed_step_tokens=5), 400, {}, {}),
    "one after another": (Limits(512, mixed_step_tokens=24), 400, {}, {"every": 3}),
    "preempted": (Limits(512, step_tokens=48), 8, {}, {}),
    "preempted, nothing shared": (Limits(512, step_tokens=48), 8, {"prefix_sharing": False}, {}),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("requests", [REQUESTS, PLAIN], ids=["all", "plain"])
def test_the_same_tokens_whatever_the_way(model, plain, counts, way, requests):
    limits, num_blocks, chosen, traffic = WAYS[way]
    engine = ahead_engine(model, limits, num_blocks, counts, **chosen)
    for _ in range(2):  # the second time from the prefix cache
        assert_same(run(engine, requests, **traffic), of(plain, requests), requests)
    assert engine._device.num_replays > 40 and engine._device.num_graphs <= 8
    assert counts["ahead"] > 10 and (requests is REQUESTS or counts["dropped"] > 0)


def test_guesses_are_rows_of_a_graph_and_nothing_is_ahead_of_them(model, plain, counts):
    engine = ahead_engine(model, Limits(512, max_running=16), 400, counts, proposer=PromptLookup(min_ngram=1))
    found = run(engine, REQUESTS)
    assert_same(found, of(plain, REQUESTS))
    assert found.counts["accepted"] > 20 and engine._device.num_replays > 10 and not counts["ahead"]


def test_random_traffic_with_cancels(model, counts):
    """Requests come and go while steps are in flight, over a pool in which they hardly fit."""
    rng = random.Random(5)
    trunk = random_ids(40)
    for number in range(4):
        requests = [request(f"r{place}", (*trunk[:rng.choice([0, 17, 33])], *random_ids(rng.randrange(1, 20), place)),
                            seed=place, temperature=rng.choice([0.0, 1.0]), max_tokens=rng.randrange(1, 40),
                            ignore_eos=rng.random() < 0.5, logit_bias={1: 4.0}, n=rng.choice([1, 1, 1, 2]), logprobs=1)
                    for place in range(14)]
        cancelled = {one.id: rng.randrange(2, 60) for one in rng.sample(requests, 4)}
        engine = ahead_engine(model, Limits(512, max_running=6, mixed_step_tokens=40), 16, counts)
        found = run(engine, requests, every=rng.choice([1, 2, 4]), cancel=cancelled)
        expected = alone(model, requests)
        for key, ids in expected.ids.items():
            mine = found.ids.get(key, [])
            assert mine == (ids[:len(mine)] if key[0] in cancelled else ids)
            assert key[0] in cancelled or found.reasons[key] == expected.reasons[key]
    assert counts["ahead"] > 60 and counts["dropped"] > 15


# ---- what is in flight --------------------------------------------------------------------------------------------


def test_who_is_cancelled_in_flight_is_not_reported_and_its_blocks_serve_another(model, counts):
    engine = ahead_engine(model, Limits(128), 6, counts)
    first, other = (request(name, random_ids(40, place), max_tokens=40, ignore_eos=True, logprobs=0)
                    for place, name in enumerate(["first", "other"]))
    engine.submit(first)
    for _ in range(10):
        engine.step()
    assert engine._flight is not None and engine.cancel("first") and engine.has_work
    assert run(engine, [other]).ids == alone(model, [other]).ids
    assert counts["dropped"] == 1


def test_a_step_in_flight_whose_requests_are_gone_is_work_that_brings_nothing(model, counts):
    engine = ahead_engine(model, Limits(128), 6, counts)
    engine.submit(request("r", [5, 6], max_tokens=9, ignore_eos=True))
    engine.step()
    engine.cancel("r")
    assert engine.has_work and engine.step() == [] and not engine.has_work and engine.step() == []


def test_nothing_is_in_flight_after_the_last_token(model, counts):
    """Neither after an end that was foreseen, nor after one that was not."""
    engine = ahead_engine(model, Limits(128), 6, counts)
    for chosen in ({"max_tokens": 6, "ignore_eos": True}, {"logit_bias": {1: 100}, "min_tokens": 5}):
        engine.submit(request("r", [5, 6], **chosen))
        num_steps = len(list(itertools.takewhile(lambda _: engine.has_work, (engine.step() for _ in range(40)))))
        assert num_steps == 5 and not engine.has_work


def test_who_comes_begins_in_the_step_after_the_one_in_flight(model, counts):
    engine = ahead_engine(model, Limits(128), 40, counts)
    engine.submit(request("r", [5, 6], max_tokens=40, ignore_eos=True))
    for _ in range(5):
        engine.step()
    engine.submit(request("new", [7, 8], max_tokens=40, ignore_eos=True))
    names = [{event.request_id for event in engine.step()} for _ in range(2)]
    assert names == [{"r"}, {"r", "new"}]
    assert engine._flight is not None  # and both go on ahead


def test_who_waits_for_room_does_not_keep_the_others_from_running_ahead(model, counts):
    engine = ahead_engine(model, Limits(128, max_running=2), 40, counts)
    requests = [request(f"r{place}", [5, 6], max_tokens=20, ignore_eos=True, logprobs=0) for place in range(3)]
    assert run(engine, requests).ids == alone(model, requests).ids
    assert counts["ahead"] > 30


def test_a_step_for_some_lands_what_is_in_flight_for_all_and_leaves_nothing_there(model, counts):
    engine = ahead_engine(model, Limits(128), 40, counts)
    for name in "ab":
        engine.submit(request(name, [5, 6], max_tokens=9, ignore_eos=True))
    engine.step()
    assert [event.request_id for event in engine.step({"a"})] == ["a", "b", "a"] and engine._flight is None


def test_the_books_know_what_is_in_flight(model, counts):
    engine = ahead_engine(model, Limits(128), 40, counts)
    engine.submit(request("r", [5, 6], max_tokens=9, ignore_eos=True))
    engine.step()
    [item] = engine._flight.plan.scheduled
    engine.check()
    item.sequence.table.pop()
    with pytest.raises(AssertionError, match="in flight"):
        engine.check()


def test_nothing_is_ahead_of_a_grammar_and_it_is_followed_beside_others(model, counts):
    chosen = [{"grammar": "steps", "temperature": 1.0}, {"max_tokens": 9, "ignore_eos": True}, {"grammar": "steps 5"},
              {"max_tokens": 40, "ignore_eos": True}]
    requests = [request(f"r{place}", random_ids(9, place), seed=place, logprobs=0, **{"max_tokens": 30, **one})
                for place, one in enumerate(chosen)]
    expected = run(engine_of(model, Limits(512), 60, compiler=Steps), requests)
    assert_same(run(ahead_engine(model, Limits(512), 60, counts, compiler=Steps), requests), expected, requests)
    assert 0 < counts["ahead"] < 32  # when the others have ended


def test_who_waited_for_its_grammar_is_not_passed_over_by_steps_ahead(model, counts):
    """It runs, and is in no plan until the grammar is compiled; then it is in the next."""
    compiled = threading.Event()

    def slowly(grammar):
        compiled.wait()
        return Steps(grammar)

    engine = ahead_engine(model, Limits(128), 40, counts, compiler=slowly)
    engine.submit(request("plain", [5, 6], max_tokens=40, ignore_eos=True))
    engine.submit(request("grammar", [7, 8, 9], max_tokens=9, grammar="steps 5"))
    for _ in range(6):
        assert {event.request_id for event in engine.step() if isinstance(event, TokenEvent)} == {"plain"}
    compiled.set()
    wait(engine._compilation._waiting)
    names = [{event.request_id for event in engine.step()} for _ in range(2)]
    assert "grammar" in names[0] | names[1]


# ---- what goes wrong ----------------------------------------------------------------------------------------------


class Failure(RuntimeError):
    """What the tests below let a step end with."""


@pytest.mark.parametrize("where", ["launch", "draw", "landing"])
def test_nothing_is_lost_by_a_step_that_fails(model, plain, counts, monkeypatch, where):
    """Before anything is enqueued, after the model is, or when the host waits; ahead or not."""
    engine = ahead_engine(model, Limits(512, step_tokens=40), 14, counts)
    owner, name = {"launch": (engine._graphs, "run"), "draw": (engine, "_draw"),
                   "landing": (flight_module.Flight, "land")}[where]
    function, calls, failures = getattr(owner, name), itertools.count(1), Counter()

    def failing(*args):
        result = function(*args)
        if next(calls) % 7 == 0:
            failures["ahead" if any(isinstance(one, Plan) and one.follows for one in args) else "other"] += 1
            raise Failure
        return result

    monkeypatch.setattr(owner, name, failing)
    step = engine.step

    def persistent():
        while True:
            try:
                return step()
            except StepError as error:
                assert isinstance(error.__cause__, Failure) and engine._flight is None
                engine.check()

    engine.step = persistent
    assert_same(run(engine, PLAIN), of(plain, PLAIN), PLAIN)
    assert sum(failures.values()) > 5 and (where == "landing" or failures["ahead"] > 2)


@pytest.mark.parametrize("when", ["before", "after"])
def test_who_is_at_fault_is_found_and_nobody_else_notices(model, counts, when):
    """The step that fails is first one ahead."""
    requests = [request(f"r{place}", random_ids(9 + place, place), max_tokens=20, ignore_eos=True, logprobs=0)
                for place in range(5)]
    expected = alone(model, requests).ids
    engine = ahead_engine(model, Limits(512), 60, counts)
    launch, events, culprits = engine._run, [], {}

    def faulty(plan):
        is_at_fault = any(item.sequence.request.id == "r2" and item.start > 17 for item in plan.scheduled)
        if is_at_fault and when == "before":
            raise Failure
        launched = launch(plan)
        if is_at_fault:
            raise Failure
        return launched

    engine._run = faulty
    for one in requests:
        engine.submit(one)
    while engine.has_work:
        brought, found = isolate.step(engine)
        events += brought
        culprits |= found
    ids = {one.id: [event.token_id for event in events if isinstance(event, TokenEvent) and event.request_id == one.id]
           for one in requests}
    assert culprits.keys() == {"r2"} and ids["r2"] == expected["r2", 0][:8]
    assert all(ids[one.id] == expected[one.id, 0] for one in requests if one.id != "r2")


def test_what_was_launched_on_a_token_that_the_host_draws_again_is_dropped(model, counts, monkeypatch):
    """Rows flatter than their candidates, of which only the host finds out."""
    monkeypatch.setattr(sampler, "NUM_CANDIDATES", 8)
    requests = [request(f"r{place}", random_ids(9, place), seed=place, temperature=2.0, top_p=0.97, max_tokens=20,
                        ignore_eos=True, logprobs=1) for place in range(3)]
    expected = alone(model, requests)
    assert_same(run(ahead_engine(model, Limits(512), 60, counts), requests), expected, requests)
    assert counts["amended"] > 10 and counts["ahead"] > 10


def no_arrival(monkeypatch):
    monkeypatch.setattr("tests.engine.recording._Arrival.synchronize", lambda _: None)


def no_drop(monkeypatch):
    class Everybody:
        def __contains__(self, _):
            return True

    land = flight_module.Flight.land
    monkeypatch.setattr(flight_module.Flight, "land", lambda flight, _: land(flight, Everybody()))


def no_padding(monkeypatch):
    monkeypatch.setattr(graphs_module._Graph, "_numbers", _without_spare(graphs_module._Graph._numbers))


def _without_spare(numbers):
    def filled_up_with_zeros(graph, plan, places):
        arrays = numbers(graph, plan, places)
        arrays[2][arrays[2] == graph._cache.spare_slot] = 0
        return arrays
    return filled_up_with_zeros


def no_ids_from_the_device(monkeypatch):
    monkeypatch.setattr(torch, "index_select", lambda *_, out: out)


def amended_is_kept(monkeypatch):
    monkeypatch.setattr(sampler.Draw, "amended", lambda *_: False)


def no_room_made(monkeypatch):
    monkeypatch.setattr("llama.engine.blocks.BlockPool.num_available", 1 << 20)


@pytest.mark.parametrize("fault", [no_arrival, no_drop, no_padding, no_ids_from_the_device, amended_is_kept, no_room_made])
def test_the_comparison_finds_a_fault(model, monkeypatch, fault):
    """Each of the things that make it right, taken away."""
    if fault is amended_is_kept:
        monkeypatch.setattr(sampler, "NUM_CANDIDATES", 8)
    requests = [replace(one, params=replace(one.params, top_p=0.97 if one.params.temperature else 1.0)) for one in PLAIN]
    expected = alone(model, requests)
    fault(monkeypatch)
    engine = engine_of(model, Limits(512), 40, device=RecordingDevice())
    with pytest.raises((AssertionError, IndexError, ValueError, StepError, KeyError)):
        assert_same(run(engine, requests), expected, requests)


def test_every_token_event_has_its_own_step(model, counts):
    """Nothing is reported twice, nothing late: one token a step."""
    engine = ahead_engine(model, Limits(128), 40, counts)
    engine.submit(request("r", [5, 6], max_tokens=9, ignore_eos=True))
    tokens = [sum(isinstance(event, TokenEvent) for event in engine.step()) for _ in range(9)]
    assert tokens == [1] * 9 and not engine.has_work
