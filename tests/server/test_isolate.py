"""server.isolate: of the requests in a step that raised, those at fault end, and the others do not notice."""

import random

import pytest

from llama.engine.request import PromptEvent, StepError, TokenEvent
from server import isolate
from tests.server.scripted import ScriptedEngine, request, token


def run(engine, requests):
    """All events of all requests, and the sentences of those that could not go on."""
    for one in requests:
        engine.submit(one)
    events, culprits = [], {}
    while engine.has_work:
        brought, found = isolate.step(engine)
        assert not culprits.keys() & found.keys()
        assert not culprits.keys() & {event.request_id for event in brought}
        events += brought
        culprits |= found
    return events, culprits


def tokens_of(events, name):
    return [event.token_id for event in events if event.request_id == name and isinstance(event, TokenEvent)]


@pytest.mark.parametrize("at_fault", [
    {0: 0}, {6: 3}, {0: 2, 1: 2, 6: 2}, {2: 0, 3: 4, 4: 4}, {n: 1 for n in range(6)}])
def test_only_those_at_fault_end(at_fault):
    requests = [request(f"r{number}", prompt=(number, 5)) for number in range(7)]
    engine = ScriptedEngine(faults={f"r{number}": f"raise@{place}" for number, place in at_fault.items()})
    events, culprits = run(engine, requests)
    assert culprits.keys() == {f"r{number}" for number in at_fault}
    assert (isolate.PROBE.id, None) not in engine.cancelled  # who got through proves the engine sound
    for number, one in enumerate(requests):
        length = at_fault.get(number, 5)
        assert tokens_of(events, one.id) == [token(one, 0, position) for position in range(length)]
        assert culprits.get(one.id) in (None, f"RuntimeError: {one.id} cannot be computed")
    begun = {event.request_id for event in events if isinstance(event, PromptEvent)}
    assert begun == {one.id for number, one in enumerate(requests) if at_fault.get(number) != 0}


def test_the_number_of_steps_grows_with_the_logarithm():
    engine = ScriptedEngine(faults={"r37": "raise@0"}, max_running=64)
    run(engine, [request(f"r{number}", max_tokens=1) for number in range(64)])
    assert engine.num_steps == 1 + 2 * 6  # the step itself, then two halves at each of six levels


def test_one_alone_is_at_fault_and_the_engine_goes_on():
    engine = ScriptedEngine(faults={"bad": "raise@2"})
    events, culprits = run(engine, [request("bad")])
    assert len(tokens_of(events, "bad")) == 2
    assert culprits == {"bad": "RuntimeError: bad cannot be computed"}
    assert not engine.has_work
    assert engine.cancelled[-1] == (isolate.PROBE.id, None)
    assert run(engine, [request("good")])[1] == {}


def test_an_engine_that_fails_whatever_it_is_given_is_broken():
    engine = ScriptedEngine(broken_after=2)
    with pytest.raises(isolate.BrokenEngineError, match="^the engine cannot compute anything any more: "):
        run(engine, [request(f"r{number}") for number in range(3)])


def test_a_step_that_fails_only_as_a_whole_is_nobody_s_fault(capfd):
    engine = ScriptedEngine()
    whole = engine.step

    def too_large(only=None):
        names = [one.request.id for one in (*engine.waiting, *engine.running)
                 if only is None or one.request.id in only]
        if len(names) > 2:
            raise StepError(tuple(names)) from MemoryError("out of memory")
        return whole(only)

    engine.step = too_large
    events, culprits = run(engine, [request(f"r{number}") for number in range(7)])
    assert culprits == {}
    assert all(len(tokens_of(events, f"r{number}")) == 5 for number in range(7))
    assert "out of memory" in capfd.readouterr().err  # the first failure's traceback, for the log


def test_an_exception_without_names_is_not_caught():
    engine = ScriptedEngine(faults={"r1": "defect@1"})
    with pytest.raises(ZeroDivisionError, match="the books are wrong"):
        run(engine, [request("r0"), request("r1")])


def test_the_books_are_checked_afterwards():
    engine = ScriptedEngine(faults={"r0": "raise@0"})
    engine.submit(request("r0"))
    engine.submit(request("r1"))
    engine.check = lambda: pytest.fail("looked at")
    with pytest.raises(pytest.fail.Exception, match="looked at"):
        isolate.step(engine)


def test_sentences():
    assert isolate.sentence(isolate.BrokenEngineError("as it is")) == "as it is"
    assert isolate.sentence(ValueError("odd")) == "ValueError: odd"
    assert isolate.sentence(MemoryError()) == "MemoryError"


def test_faults_at_random():
    rng = random.Random(5)
    for _ in range(40):
        requests = [request(f"r{number}", max_tokens=rng.randint(1, 6), prompt=(number,), n=rng.randint(1, 3))
                    for number in range(rng.randint(1, 12))]
        faults = {one.id: rng.randrange(one.params.max_tokens) for one in requests if rng.random() < 0.3}
        engine = ScriptedEngine(max_running=rng.choice([2, 5, 64]),
                                faults={name: f"raise@{place}" for name, place in faults.items()})
        events, culprits = run(engine, requests)
        assert culprits.keys() == faults.keys()
        for one in requests:
            length = faults.get(one.id, one.params.max_tokens)
            for index in range(one.params.n):
                got = [event.token_id for event in events if isinstance(event, TokenEvent)
                       and (event.request_id, event.index) == (one.id, index)]
                assert got == [token(one, index, position) for position in range(length)]
