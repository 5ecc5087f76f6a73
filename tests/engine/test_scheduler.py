"""llama.engine.scheduler, each rule by name, on the fake model of simulation.py (blocks of 4 positions)."""

import pytest

from llama.engine.limits import Limits
from llama.engine.request import QueueFullError, RequestError
from tests.engine.simulation import VOCAB, Simulation, request

LIMITS = Limits(max_context=64, max_running=8, step_tokens=16, mixed_step_tokens=8)


class Guesses:
    """As many guesses as are allowed: always the one id that is given for the request."""

    def __init__(self, guesses):
        self.guesses, self.forgotten = guesses, []

    def propose(self, sequence, most):
        return (self.guesses[sequence.request.id],) * most if sequence.request.id in self.guesses else ()

    def forget(self, sequence):
        self.forgotten.append((sequence.request.id, sequence.index))


def scripted(*tokens):
    """Draws these tokens one after another, after a prompt of three."""
    return lambda ids, seed, index: tokens[len(ids) - 3]


def lengths(simulation):
    """What the next step computes of each request, and then does."""
    plans = []
    plan = simulation.scheduler.plan

    def observed():
        plans.append(plan())
        return plans[-1]

    simulation.scheduler.plan = observed
    simulation.step()
    simulation.scheduler.plan = plan
    return {item.sequence.request.id: item.length for item in plans[0].scheduled}


def refusal(simulation, *args, **chosen):
    with pytest.raises(RequestError) as caught:
        simulation.submit(request("r", *args, **chosen))
    assert not simulation.scheduler.has_work
    return caught.value.field, str(caught.value)


# ---- at the door -------------------------------------------------------------------------------------------


def test_what_can_never_fit_is_refused_with_its_numbers():
    simulation = Simulation(LIMITS, num_blocks=40)
    assert refusal(simulation, []) == ("prompt", "the prompt is empty; give at least one token")
    assert refusal(simulation, [1] * 64) == (
        "prompt", "the prompt has 64 tokens, and the context is 64 tokens; shorten the prompt")
    assert refusal(simulation, [1] * 50, max_tokens=15) == (
        "max_tokens", "the prompt's 50 tokens and max_tokens 15 together exceed the context of 64 tokens; "
        "lower max_tokens to at most 14")
    assert refusal(simulation, [1], n=9) == ("n", "n is 9, but at most 8 sequences run at once")
    simulation.submit(request("fits", [1] * 50, max_tokens=14, n=8))
    simulation.drain()


def test_what_the_cache_can_never_hold_is_refused_with_its_numbers():
    simulation = Simulation(LIMITS, num_blocks=8)
    field, message = refusal(simulation, [1] * 20, max_tokens=13)
    assert field == "max_tokens" and "may take 33 tokens" in message and "the KV cache holds 32" in message
    field, message = refusal(simulation, [1] * 32)
    assert "the KV cache holds 32" in message
    simulation.submit(request("fits", [1] * 20, max_tokens=12, ignore_eos=True))
    simulation.submit(request("open", [1] * 31, ignore_eos=True))
    simulation.drain()
    assert len(simulation.answers["open", 0].ids) == 1


def test_the_queue_is_bounded_by_requests():
    simulation = Simulation(Limits(64, max_queued_requests=2), 40)
    for name in "ab":
        simulation.submit(request(name, [1], max_tokens=4))
    with pytest.raises(QueueFullError, match="2 requests wait already; try again later"):
        simulation.submit(request("c", [1]))
    simulation.step()
    simulation.submit(request("c", [1], max_tokens=4))
    simulation.drain()


def test_the_queue_is_bounded_by_tokens_but_takes_one_of_any_length():
    simulation = Simulation(Limits(64, max_queued_tokens=20), 40)
    simulation.submit(request("long", [1] * 30, max_tokens=4))
    with pytest.raises(QueueFullError, match="prompts of 30 tokens wait already; try again later"):
        simulation.submit(request("short", [1]))
    simulation.drain()
    simulation.submit(request("a", [1] * 10, max_tokens=4))
    simulation.submit(request("b", [1] * 10, max_tokens=4))
    with pytest.raises(QueueFullError):
        simulation.submit(request("c", [1]))
    simulation.drain()


def test_a_negative_seed_is_one_of_64_bits_and_none_is_new_each_time():
    simulation = Simulation(LIMITS, 40)
    for seed in (-1, None, None):
        simulation.scheduler.add(request(f"{seed}", [1], seed=seed))
    negative, one, other = (sequence.seed for sequence in simulation.scheduler.waiting)
    assert negative == 2**64 - 1 and one != other and 0 <= one < 2**64


# ---- whose turn it is --------------------------------------------------------------------------------------


def test_a_prompt_is_cut_into_chunks_of_a_step():
    simulation = Simulation(LIMITS, 40)
    simulation.submit(request("a", [1] * 35, max_tokens=2, ignore_eos=True))
    assert [lengths(simulation) for _ in range(4)] == [{"a": 16}, {"a": 16}, {"a": 3}, {"a": 1}]
    simulation.drain()


def test_who_decodes_never_waits_for_a_long_prompt():
    simulation = Simulation(LIMITS, 40)
    simulation.submit(request("a", [1], max_tokens=20, ignore_eos=True))
    simulation.step()
    simulation.submit(request("long", [2] * 30, max_tokens=5, ignore_eos=True))
    assert [lengths(simulation) for _ in range(4)] == [{"a": 1, "long": 7}] * 4
    simulation.drain()


def test_prompts_begin_in_order_of_arrival_and_share_what_a_step_has_left():
    simulation = Simulation(LIMITS, 40)
    for name, length in (("a", 20), ("b", 5), ("c", 30)):
        simulation.submit(request(name, [ord(name)] * length, max_tokens=4, ignore_eos=True))
    assert lengths(simulation) == {"a": 16}
    assert lengths(simulation) == {"a": 4, "b": 5, "c": 7}
    assert lengths(simulation) == {"a": 1, "b": 1, "c": 6}
    simulation.drain()


def test_decodes_that_fill_a_step_still_let_prompts_go_on():
    simulation = Simulation(Limits(64, max_running=8, step_tokens=8, mixed_step_tokens=2), 40)
    for name in "abc":
        simulation.submit(request(name, [1, 2], max_tokens=30, ignore_eos=True))
    simulation.step()
    simulation.submit(request("d", [3] * 4, max_tokens=2, ignore_eos=True))
    assert lengths(simulation) == {"a": 1, "b": 1, "c": 1, "d": 1}
    simulation.drain()


@pytest.mark.parametrize("num_decoding, share", [(1, 15), (11, 5), (12, 4), (15, 4), (40, 4)])
def test_prompts_have_a_quarter_of_a_step_however_many_decode(num_decoding, share):
    simulation = Simulation(Limits(64, max_running=64, step_tokens=64, mixed_step_tokens=16), 400)
    for number in range(num_decoding):
        simulation.submit(request(f"r{number}", [number % VOCAB], max_tokens=40, ignore_eos=True))
    simulation.step()
    simulation.submit(request("long", [1] * 40, max_tokens=2, ignore_eos=True))
    computed = lengths(simulation)
    assert computed.pop("long") == share and computed == {f"r{number}": 1 for number in range(num_decoding)}
    simulation.drain()


def test_samples_not_yet_split_off_count_among_the_running():
    simulation = Simulation(Limits(64, max_running=4, step_tokens=4), 40)
    simulation.submit(request("a", [1] * 6, n=3, max_tokens=9, ignore_eos=True))
    simulation.submit(request("b", [2] * 2, n=2, max_tokens=9, ignore_eos=True))
    simulation.step()
    assert len(simulation.scheduler.waiting) == 1
    simulation.drain()


# ---- preemption --------------------------------------------------------------------------------------------


def test_the_youngest_gives_way_and_goes_on_later():
    simulation = Simulation(LIMITS, num_blocks=8)
    for name in "abc":
        simulation.submit(request(name, [ord(name)] * 6, max_tokens=20, ignore_eos=True))
    gone = set()
    while simulation.scheduler.has_work:
        simulation.step()
        gone |= {sequence.request.id for sequence in simulation.scheduler.waiting if sequence.num_generated}
    assert gone == {"b", "c"} and simulation.counts["preempted"] >= 2
    simulation.drain()


def test_who_would_have_to_give_way_at_once_does_not_begin():
    simulation = Simulation(LIMITS, num_blocks=6)
    simulation.submit(request("a", [1] * 8, max_tokens=6, ignore_eos=True))
    for _ in range(4):
        simulation.step()
    simulation.submit(request("b", [2] * 11, max_tokens=1))  # three blocks are free, of which a will take one
    assert [lengths(simulation) for _ in range(3)] == [{"a": 1}, {"a": 1}, {"b": 11}]
    simulation.drain()


def test_what_was_taken_back_is_found_again_where_nobody_needed_the_room():
    simulation = Simulation(LIMITS, num_blocks=12)
    simulation.submit(request("a", [1] * 10, max_tokens=30, ignore_eos=True))
    simulation.submit(request("b", [2] * 10, max_tokens=30, ignore_eos=True))
    while not simulation.counts["preempted"]:
        simulation.step()
    [gone] = simulation.scheduler.waiting
    while simulation.scheduler.waiting:
        again = lengths(simulation)
    assert again["b"] == len(gone.ids) - 8 - 1  # two blocks were left of it, and a new token is drawn by now
    simulation.drain()


def test_a_guess_takes_nobodys_blocks():
    simulation = Simulation(LIMITS, num_blocks=5, proposer=Guesses({"a": 5}))
    simulation.submit(request("a", [1] * 4, max_tokens=5, ignore_eos=True))
    simulation.submit(request("b", [2] * 7, max_tokens=2, ignore_eos=True))
    simulation.drain()
    assert simulation.counts["guessed"] and not simulation.counts["preempted"]


def test_guesses_come_after_prompts_in_a_step():
    simulation = Simulation(LIMITS, 40, Guesses({"a": 5, "b": 5}))
    simulation.submit(request("a", [1], max_tokens=40, ignore_eos=True))
    assert lengths(simulation) == {"a": 1}
    assert lengths(simulation) == {"a": 8}
    simulation.submit(request("b", [2] * 12, max_tokens=9, ignore_eos=True))
    assert lengths(simulation) == {"a": 1, "b": 7}
    assert lengths(simulation) == {"a": 3, "b": 5}
    simulation.drain()


def test_the_proposer_is_told_of_all_who_leave():
    guesses = Guesses({})
    simulation = Simulation(LIMITS, 40, guesses)
    for name in "abc":
        simulation.submit(request(name, [1] * 3, n=2, max_tokens=3, ignore_eos=True))
    simulation.cancel("c")
    simulation.step()
    simulation.cancel("b", 1)
    simulation.drain()
    assert sorted(guesses.forgotten) == [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", 0)]


# ---- cancel ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, where", [(0, "queue"), (1, "prefill"), (4, "decode")])
@pytest.mark.parametrize("n", [1, 3])
def test_cancel_frees_the_blocks_at_once(steps, where, n):
    simulation = Simulation(LIMITS, 40)
    simulation.submit(request("a", [1] * 30, n=n, max_tokens=20, ignore_eos=True))
    for _ in range(steps):
        simulation.step()
    assert bool(simulation.scheduler.waiting) == (where == "queue")
    assert any(sequence.is_decoding for sequence in simulation.scheduler.running) == (where == "decode")
    assert simulation.cancel("a")
    assert not simulation.scheduler.has_work and simulation.scheduler.pool.num_held == 0
    assert not simulation.cancel("a")


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_cancel_of_one_sample_leaves_the_others(steps, index):
    simulation = Simulation(LIMITS, 40)
    simulation.submit(request("a", [1] * 30, n=3, max_tokens=20, ignore_eos=True))
    for _ in range(steps):
        simulation.step()
    assert simulation.cancel("a", index)
    assert not simulation.cancel("a", index)
    simulation.drain()
    complete = [other for other in range(3) if len(simulation.answers["a", other].ids) == 20]
    assert complete == [other for other in range(3) if other != index]


def test_cancel_of_the_last_sample_is_the_end():
    simulation = Simulation(LIMITS, 40)
    simulation.submit(request("a", [1] * 30, n=2))
    simulation.step()
    assert simulation.cancel("a", 0) and simulation.cancel("a", 1)
    assert not simulation.scheduler.has_work


def test_cancel_of_a_stranger_finds_nothing():
    simulation = Simulation(LIMITS, 40)
    simulation.submit(request("a", [1], max_tokens=4))
    assert not simulation.scheduler.cancel("b") and not simulation.scheduler.cancel("a", 1)
    simulation.drain()


# ---- ahead -------------------------------------------------------------------------------------------------


def planned(num_running, *max_tokens):
    """Scheduler and first step of requests "0", "1", ... with prompts of three that may generate so much."""
    simulation = Simulation(Limits(max_context=64, max_running=num_running, step_tokens=16, mixed_step_tokens=8), num_blocks=40)
    for name, most in enumerate(max_tokens):
        simulation.submit(request(str(name), [1, 2, 3], max_tokens=most))
    return simulation.scheduler, simulation.scheduler.plan()


def test_who_ends_with_the_token_that_is_being_drawn_is_not_planned_ahead():
    scheduler, plan = planned(8, 1, 2)
    ahead = scheduler.plan_ahead(plan)
    assert [(item.sequence.request.id, item.start, item.length) for item in ahead.scheduled] == [("1", 3, 1)]
    assert ahead.follows == [1]
    assert scheduler.plan_ahead(ahead) is None
    scheduler, plan = planned(8, 1)
    assert scheduler.plan_ahead(plan) is None


def test_who_waits_for_the_place_of_somebody_who_ends_is_not_passed_over():
    scheduler, plan = planned(2, 2, 2, 5)
    assert len(scheduler.waiting) == 1 and len(scheduler.plan_ahead(plan).scheduled) == 2  # nobody's place is free yet
    scheduler, plan = planned(2, 1, 5, 5)
    assert len(scheduler.waiting) == 1 and scheduler.plan_ahead(plan) is None
