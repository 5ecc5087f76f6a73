"""What a request brings: prefixes found, samples split off, events in order, the end (on simulation.py)."""

import pytest

from llama.engine.limits import Limits
from llama.engine.request import PromptEvent, TokenEvent
from tests.engine.simulation import EOS, Simulation, request
from tests.engine.test_scheduler import LIMITS, lengths, scripted


def run(simulation, *requests):
    """All to their ends, together. Returns the events in order."""
    for one in requests:
        simulation.submit(one)
    events = []
    while simulation.scheduler.has_work:
        events += simulation.step()
    simulation.drain()
    return events


def cached(simulation, name):
    """How many of the prompt's tokens were found."""
    return sum(event.num_cached for event in simulation.prompts[name])


# ---- prefixes ----------------------------------------------------------------------------------------------


def test_a_prompt_takes_the_longest_prefix_that_is_there():
    simulation = Simulation(LIMITS, 40)
    run(simulation, request("a", range(18), max_tokens=1))
    for name, prompt, found in (("all", range(18), 16), ("part", [*range(10), 0], 8),
                                ("none", range(1, 18), 0), ("short", range(3), 0)):
        run(simulation, request(name, prompt, max_tokens=1))
        assert cached(simulation, name) == found


def test_at_least_one_token_is_computed():
    simulation = Simulation(LIMITS, 40)
    run(simulation, request("a", range(16), max_tokens=1), request("b", range(4), max_tokens=1))
    run(simulation, request("again", range(16), max_tokens=1))
    assert cached(simulation, "again") == 12


def test_an_answer_is_a_prefix_too():
    simulation = Simulation(LIMITS, 40)
    run(simulation, request("a", [1, 2, 3], max_tokens=14, ignore_eos=True))
    turn = [1, 2, 3, *simulation.answers["a", 0].ids, 5, 5]
    run(simulation, request("b", turn, max_tokens=1))
    assert cached(simulation, "b") == 16  # the seventeenth token was drawn and never computed


def test_a_running_prompt_is_shared_with():
    simulation = Simulation(LIMITS, 40)
    simulation.submit(request("a", range(12), max_tokens=9, ignore_eos=True))
    simulation.step()
    held = simulation.scheduler.pool.num_held
    simulation.submit(request("b", [*range(12), 1], max_tokens=9, ignore_eos=True))
    simulation.step()
    assert cached(simulation, "b") == 12 and simulation.scheduler.pool.num_held == held + 2  # one each
    simulation.drain()


def test_a_block_that_is_not_computed_is_not_found():
    simulation = Simulation(Limits(64, step_tokens=6), 40)
    simulation.submit(request("a", range(16), max_tokens=1))
    simulation.step()
    simulation.submit(request("b", range(16), max_tokens=1))
    simulation.cancel("a")
    simulation.drain()
    assert cached(simulation, "b") == 4  # of six computed


def test_salts_do_not_see_each_other():
    simulation = Simulation(LIMITS, 40)
    run(simulation, request("a", range(16), "one", max_tokens=1))
    run(simulation, request("b", range(16), "two", max_tokens=1))
    run(simulation, request("c", range(16), "one", max_tokens=1))
    assert (cached(simulation, "b"), cached(simulation, "c")) == (0, 12)


def test_sharing_can_be_off():
    simulation = Simulation(LIMITS, 40, prefix_sharing=False)
    run(simulation, request("a", range(16), max_tokens=1))
    run(simulation, request("b", range(16), max_tokens=1))
    assert cached(simulation, "b") == 0


def test_prompt_scores_are_computed_where_the_prefix_is_there():
    simulation = Simulation(LIMITS, 40)
    run(simulation, request("a", range(16), max_tokens=1))
    events = run(simulation, request("b", range(16), max_tokens=1, prompt_logprobs=0))
    pieces = [event for event in events if isinstance(event, PromptEvent)]
    assert [score.token_id for event in pieces for score in event.logprobs] == list(range(16))
    assert cached(simulation, "b") == 0


def test_prompt_scores_are_reported_once_though_the_prompt_was_preempted():
    simulation = Simulation(Limits(64, step_tokens=8, mixed_step_tokens=2), 9)
    simulation.submit(request("a", [1] * 3, max_tokens=28, ignore_eos=True))
    simulation.submit(request("b", range(24), max_tokens=2, prompt_logprobs=0))
    while not simulation.counts["preempted"]:
        simulation.step()
    assert 10 < sum(len(event.logprobs) for event in simulation.prompts["b"]) < 24
    simulation.drain()  # which compares the scores


# ---- samples -----------------------------------------------------------------------------------------------


def test_samples_share_one_prefill_and_begin_together():
    simulation = Simulation(LIMITS, 40)
    simulation.submit(request("a", range(12), n=3, max_tokens=4, ignore_eos=True))
    assert lengths(simulation) == {"a": 12}
    assert {index: len(answer.ids) for (_, index), answer in simulation.answers.items()} == {0: 1, 1: 1, 2: 1}
    assert simulation.scheduler.pool.num_held == 3
    simulation.drain()
    assert len({tuple(answer.ids) for answer in simulation.answers.values()}) > 1


@pytest.mark.parametrize("length, copies", [(12, 0), (13, 2), (15, 2)])
def test_only_a_block_begun_by_the_prompt_is_copied_and_not_for_the_last(length, copies):
    simulation = Simulation(LIMITS, 40)
    run(simulation, request("a", [1] * length, n=3, max_tokens=9, ignore_eos=True))
    assert simulation.counts["copies"] == copies


def test_a_sample_left_alone_writes_in_place():
    simulation = Simulation(LIMITS, 40)
    simulation.submit(request("a", [1] * 6, n=2, max_tokens=9, ignore_eos=True))
    simulation.step()
    simulation.cancel("a", 0)
    simulation.drain()
    assert simulation.counts["copies"] == 0


@pytest.mark.parametrize("is_computed", [False, True])
def test_blocks_are_copied_though_the_step_failed(is_computed):
    simulation = Simulation(LIMITS, 40)
    simulation.submit(request("a", [1] * 13, n=3, max_tokens=9, ignore_eos=True))
    simulation.step()
    simulation.fail(is_computed)
    simulation.fail(is_computed)
    simulation.drain()
    assert simulation.counts["copies"] == 2


# ---- events ------------------------------------------------------------------------------------------------


def test_the_prompts_event_comes_first_and_the_end_last():
    simulation = Simulation(LIMITS, 40)
    events = run(simulation, request("a", range(20), n=2, max_tokens=3, ignore_eos=True))
    assert isinstance(events[0], PromptEvent)
    assert [(event.index, event.finish_reason) for event in events[1:]] == [
        (0, None), (1, None), (0, None), (1, None), (0, "length"), (1, "length")]


def test_log_probabilities_are_reported_where_asked_for():
    simulation = Simulation(LIMITS, 40)
    events = run(simulation, request("a", [1], max_tokens=1), request("b", [1], max_tokens=1, logprobs=0))
    reported = {event.request_id: event.logprob for event in events if isinstance(event, TokenEvent)}
    assert reported["a"] is None and reported["b"].token_id == simulation.answers["b", 0].ids[0]


# ---- the end -----------------------------------------------------------------------------------------------


def ending(tokens, **chosen):
    """How many of the scripted tokens come, and why it ends."""
    simulation = Simulation(LIMITS, 40, draw=scripted(*tokens))
    run(simulation, request("r", [0, 0, 0], **chosen))
    answer = simulation.answers["r", 0]
    assert answer.ids == list(tokens[:len(answer.ids)])
    return len(answer.ids), answer.finish_reason, answer.stop_reason


def test_the_models_own_end():
    assert ending([1, 2, EOS, 4]) == (3, "stop", None)
    assert ending([1, 2, EOS, 4], ignore_eos=True, max_tokens=4) == (4, "length", None)


def test_stop_token_ids_end_it_and_say_which():
    assert ending([1, 2, 5, 4], stop_token_ids=(4, 5)) == (3, "stop", 5)
    assert ending([1, 2, 5, 4], stop_token_ids=(4, 5), ignore_eos=True) == (3, "stop", 5)
    assert ending([1, EOS], stop_token_ids=(EOS,)) == (2, "stop", EOS)
    assert ending([1, EOS], stop_token_ids=(EOS,), ignore_eos=True) == (2, "stop", EOS)


def test_max_tokens_ends_it():
    assert ending([1, 2, 3, 4], max_tokens=3) == (3, "length", None)
    assert ending([1, 2, EOS, 4], max_tokens=3) == (3, "stop", None)


def test_nothing_stops_before_min_tokens():
    assert ending([EOS, 5, EOS, 4], min_tokens=2, stop_token_ids=(5,)) == (3, "stop", None)
    assert ending([EOS, 5, 5, 4], min_tokens=2, stop_token_ids=(5,)) == (3, "stop", 5)
    assert ending([EOS, 1, 2], min_tokens=0) == (1, "stop", None)


def test_the_contexts_end_is_a_length():
    simulation = Simulation(Limits(max_context=10), 40)
    run(simulation, request("r", [0, 0, 0], ignore_eos=True))
    answer = simulation.answers["r", 0]
    assert len(answer.ids) == 7 and answer.finish_reason == "length"


def test_guesses_beyond_the_end_are_dropped():
    class Oracle:
        """Guesses right, and past the end."""

        def propose(self, sequence, most):
            return (1, 2, EOS, 4)[sequence.num_generated:][:most]

        def forget(self, sequence):
            pass

    for chosen, expected in (({}, (3, "stop")), ({"max_tokens": 2}, (2, "length"))):
        simulation = Simulation(LIMITS, 40, Oracle(), draw=scripted(1, 2, EOS, 4, 5))
        run(simulation, request("r", [0, 0, 0], **chosen))
        answer = simulation.answers["r", 0]
        assert (len(answer.ids), answer.finish_reason) == expected and simulation.counts["steps"] == 2
