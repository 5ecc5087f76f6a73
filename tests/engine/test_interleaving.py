"""The scheduler and the pool under everything that can happen to them in any order (see simulation.py)."""

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from llama.engine.limits import Limits
from llama.engine.propose import PromptLookup
from llama.engine.request import QueueFullError, RequestError
from tests.engine.simulation import BLOCK_SIZE, EOS, VOCAB, Simulation, request

# Prompts are beginnings of these, and something of their own: most blocks are somebody else's too.
TRUNKS = ((1, 2, 3) * 12, (1, 2, 3, 1, 2, 3, 1, 2, 4, 4) * 4, (5,) * 36)


@pytest.mark.parametrize("ahead", [False, True])
def test_ten_thousand_cancels_lose_no_block(ahead):
    """In the queue, in the prompt, among the answers, in flight, one sample or all; and all was really in use."""
    rng = random.Random(0)
    lookup = PromptLookup(min_ngram=1, max_draft=4, give_up=0.1, retry_every=4)
    simulation = Simulation(Limits(64, max_running=6, step_tokens=12, mixed_step_tokens=8), 20,
                            None if ahead else lookup, ahead=ahead)
    cancels, alive = 0, []
    while cancels < 10_000:
        while len(alive) < 9:
            alive.append(f"r{len(simulation.requests)}")
            trunk = rng.choice(TRUNKS)[:rng.randrange(1, 36)]
            own = [rng.randrange(VOCAB) for _ in range(rng.randrange(4))]
            simulation.submit(request(alive[-1], (*trunk, *own), max_tokens=rng.randrange(1, 20),
                                      n=rng.choice([1, 1, 3]), seed=rng.randrange(9),
                                      ignore_eos=rng.random() < 0.8))
        simulation.step()
        for name in rng.sample(alive, 1):
            indices = [None, *range(simulation.requests[name].params.n)]
            cancels += simulation.cancel(name, rng.choice(indices))
        alive = [name for name in alive if not simulation.is_answered(name)]
    simulation.drain()
    used = ("ahead", "dropped") if ahead else ("guessed",)
    assert min(simulation.counts[what] for what in ("preempted", "copies", "cached", *used)) > 100
    assert EOS in {token_id for answer in simulation.answers.values() for token_id in answer.ids}


class Interleaving(RuleBasedStateMachine):
    """Requests of every kind arrive, run and are cancelled, over pools in which they hardly fit."""

    @initialize(num_blocks=st.integers(2, 24), max_context=st.integers(6, 60), max_running=st.integers(1, 6),
                step_tokens=st.integers(1, 24), mixed_step_tokens=st.integers(1, 12), drafts=st.booleans(),
                ahead=st.booleans(), prefix_sharing=st.sampled_from([True, True, True, False]))
    def begin(self, num_blocks, drafts, ahead, prefix_sharing, **limits):
        limits = Limits(**limits, max_queued_requests=8, max_queued_tokens=200)
        proposer = PromptLookup(min_ngram=1, max_draft=6, give_up=0.1, retry_every=4) if drafts else None
        self.simulation = Simulation(limits, num_blocks, proposer, prefix_sharing, ahead=ahead)
        self.names = []

    @rule(trunk=st.sampled_from(TRUNKS), shared=st.integers(0, 36),
          own=st.lists(st.integers(0, VOCAB - 1), max_size=6), salt=st.sampled_from(["", "", "other"]),
          max_tokens=st.none() | st.integers(1, 24), n=st.sampled_from([1, 1, 1, 2, 3]),
          seed=st.integers(0, 9), stop_token_ids=st.sampled_from([(), (), (4,)]), ignore_eos=st.booleans(),
          prompt_logprobs=st.sampled_from([None, None, 0]))
    def arrive(self, trunk, shared, own, salt, max_tokens, **chosen):
        prompt = trunk[:shared] + tuple(own)
        new = request(f"r{len(self.names)}", prompt, salt, max_tokens=max_tokens, **chosen)
        scheduler = self.simulation.scheduler
        room = min(scheduler.limits.max_context, scheduler.pool.num_blocks * BLOCK_SIZE)
        fits = (0 < len(prompt) and len(prompt) + (max_tokens or 1) <= room
                and new.params.n <= scheduler.limits.max_running)
        try:
            self.simulation.submit(new)
        except RequestError:
            assert not fits
        except QueueFullError:
            waiting = scheduler.waiting
            tokens = len(prompt) + sum(len(sequence.ids) for sequence in waiting)
            assert fits and (len(waiting) >= 8 or tokens > 200)
        else:
            assert fits
            self.names.append(new.id)

    @precondition(lambda self: self.names)
    @rule(which=st.integers(0, 99), index=st.none() | st.integers(0, 2))
    def cancel(self, which, index):
        name = self.names[-1 - which % min(len(self.names), 6)]
        n = self.simulation.requests[name].params.n
        self.simulation.cancel(name, None if index is None else index % n)

    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            if self.simulation.scheduler.has_work or self.simulation.in_flight:
                self.simulation.step()

    @rule(is_computed=st.booleans())
    def fail(self, is_computed):
        self.simulation.fail(is_computed)

    def teardown(self):
        if hasattr(self, "simulation"):
            self.simulation.drain()


Interleaving.TestCase.settings = settings(max_examples=400, stateful_step_count=40)
test_any_interleaving = Interleaving.TestCase
