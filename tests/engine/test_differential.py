"""Engines under random traffic, against tests.reference in float64, which has no cache, no batch and no guesses.

Requests of every kind arrive and are cancelled while some of the others are stepped, over pools in which they hardly
fit. Each token is then judged by itself: by the logits of the ids before it.
"""

import random
from collections import Counter, defaultdict

import numpy as np
import pytest

from llama.engine.draft import DraftModel
from llama.engine.engine import BLOCK_SIZE
from llama.engine.limits import Limits
from llama.engine.propose import PromptLookup
from llama.engine.request import PromptEvent
from llama.engine.sampler import SampleRow
from tests import reference
from tests.engine.processors import expected_adjustment, kept_distribution
from tests.engine.running import EOS, TINY, engine_of
from tests.engine.simulation import request
from tests.model.pairs import hugging_face, ours, plain_config

VOCAB = 181
TOLERANCE = 1e-4  # of log probabilities
NEAR = 2e-3  # of logits, and of the number that decides a draw, where float32 may fall on the other side

# Of each field, what a request takes one of.
KINDS = {
    "temperature": [0.0, 0.0, 0.3, 1.0, 1.6], "top_p": [1.0, 1.0, 0.9, 0.5], "top_k": [-1, -1, 5, 500],
    "min_p": [0.0, 0.0, 0.05], "frequency_penalty": [0.0, 0.0, 2.0, -1.0], "presence_penalty": [0.0, 0.0, 1.0],
    "repetition_penalty": [1.0, 1.0, 1.3, 0.7], "logit_bias": [{}, {}, {7: 30.0, 9: -100.0}],
    "stop_token_ids": [(), (), tuple(range(20, 50))], "ignore_eos": [True, False], "min_tokens": [0, 0, 1, 9],
    "max_tokens": [9, 17, 30, None], "n": [1, 1, 1, 3], "prompt_logprobs": [None, None, 0, 3], "logprobs": [0, 2],
    "seed": range(-9, 99),
}


def random_request(rng, name, trunk, room):
    """Its prompt begins like another's, or repeats itself; at most `room` ids with the answer."""
    chosen = {field: rng.choice(values) for field, values in KINDS.items()}
    longest = room - (chosen["max_tokens"] or 9)
    own = [rng.randrange(2, VOCAB) for _ in range(rng.choice([1, 3, 20]))]
    prompt = rng.choice([own[:4] * 5, trunk[:rng.randrange(50)] + own, trunk + own])[:longest]
    return request(name, prompt, rng.choice(["", "", "", "other"]), **chosen)


def random_engine(rng, model, number):
    """Small steps; by its number, few blocks or many, and who guesses."""
    proposer = [lambda: PromptLookup(min_ngram=1, retry_every=4), lambda: DraftModel(model, 30, BLOCK_SIZE),
                lambda: None][number % 3]()
    limits = Limits(rng.choice([80, 160]), max_running=rng.choice([3, 6, 16]), step_tokens=rng.choice([5, 17, 512]),
                    mixed_step_tokens=rng.choice([5, 16, 64]))
    return engine_of(model, limits, (7, 30)[number % 2], proposer=proposer, prefix_sharing=rng.random() < 0.8)


class Traffic:
    """Requests on their way through an engine; what came of them, by name and sample."""

    def __init__(self, rng, engine, requests):
        self.rng, self.engine, self.requests = rng, engine, requests
        self.tokens, self.scores, self.cancelled = defaultdict(list), defaultdict(list), set()
        self.counts = Counter()

    def run(self):
        """All of it; then every block is back."""
        upcoming = list(self.requests)
        while upcoming or self.engine.has_work:
            if upcoming and self.rng.random() < 0.3:
                self.engine.submit(upcoming.pop())
            if self.rng.random() < 0.05:
                self.cancel(self.rng.choice(self.requests))
            self.step()
        assert self.engine.scheduler.pool.num_held == 0

    def cancel(self, one):
        """One of its samples, wherever it is; not there yet or any more: nothing."""
        index = self.rng.randrange(one.params.n)
        if self.engine.cancel(one.id, index):
            self.cancelled.add((one.id, index))
            self.counts["cancelled"] += 1

    def step(self):
        """For everybody, or for half of them."""
        scheduler = self.engine.scheduler
        names = [sequence.request.id for sequence in (*scheduler.running, *scheduler.waiting)]
        only = set(names[::2]) if self.rng.random() < 0.2 else set(names)
        before = list(scheduler.running)
        events = self.engine.step(only)
        self.engine.check()
        self.counts["preempted"] += sum(sequence in scheduler.waiting for sequence in before)
        drawn = set()
        for event in events:
            assert event.request_id in only
            if isinstance(event, PromptEvent):
                self.scores[event.request_id] += event.logprobs
                self.counts["cached"] += event.num_cached
            else:
                key = event.request_id, event.index
                assert key not in self.cancelled and not (self.tokens[key] and self.tokens[key][-1].finish_reason)
                self.tokens[key].append(event)
                self.counts["guessed"] += key in drawn
                drawn.add(key)


def assert_right(traffic, weights, config, room):
    """Every sample of a traffic, token by token."""
    for one in traffic.requests:
        for index in range(one.params.n):
            events = traffic.tokens[one.id, index]
            ids = [*one.prompt_ids, *(event.token_id for event in events)]
            logits = reference.logits(weights, config, ids)  # [ids, vocab]
            if (one.id, index) not in traffic.cancelled:
                assert events[-1].finish_reason, "unanswered"
            if not traffic.cancelled & {(one.id, other) for other in range(one.params.n)}:
                assert_scores(traffic.scores[one.id], one, logits)
            for count, event in enumerate(events):
                assert_token(event, one, ids[:len(one.prompt_ids) + count], logits, room)


def assert_scores(scores, one, logits):
    """Log probabilities of the prompt, where they are wanted."""
    wanted = one.params.prompt_logprobs
    assert [score.token_id for score in scores] == ([] if wanted is None else [*one.prompt_ids])
    for score, row in zip(scores[1:], logits):
        assert_logprob(score, wanted, row)


def assert_logprob(found, num_alternatives, row):
    logprobs = row.log_softmax(-1)
    assert len(found.top) == num_alternatives
    for token_id, value in ((found.token_id, found.logprob), *found.top):
        assert value == pytest.approx(logprobs[token_id].item(), abs=TOLERANCE)
    assert [value for _, value in found.top] == pytest.approx(logprobs.topk(num_alternatives).values, abs=TOLERANCE)


def assert_token(event, one, before, logits, room):
    """What was drawn after the ids `before`, how likely it was, and whether it was the last."""
    wanted, row, num_prompt = one.params, logits[len(before) - 1], len(one.prompt_ids)
    generated = before[num_prompt:]
    banned = (*EOS, *wanted.stop_token_ids) if len(generated) < wanted.min_tokens else ()
    seen = SampleRow(wanted, 0, 0, 0, one.prompt_ids, Counter(generated), banned)
    assert_drawn(event, expected_adjustment(row.float(), seen), wanted, len(before))
    assert_logprob(event.logprob, wanted.logprobs, row)
    end = None, None
    if len(generated) + 1 == min(wanted.max_tokens or room, room - num_prompt):
        end = "length", None
    if len(generated) + 1 > wanted.min_tokens or not wanted.min_tokens:
        if event.token_id in EOS and not wanted.ignore_eos:
            end = "stop", None
        if event.token_id in wanted.stop_token_ids:
            end = "stop", event.token_id
    assert (event.finish_reason, event.stop_reason) == end


def assert_drawn(event, scores, wanted, position):
    """The likeliest by these scores [vocab], or the one in whose share of the distribution the deciding number is."""
    if wanted.temperature == 0:
        assert scores[event.token_id] > scores.max() - NEAR
        return
    likely = kept_distribution(scores, wanted)
    is_filtered = wanted.top_k > 0 or wanted.top_p < 1 or wanted.min_p > 0
    order = np.argsort(-likely, kind="stable") if is_filtered else np.arange(VOCAB)
    key = np.array([wanted.seed % 2**64, event.index], dtype=np.uint64)
    number = np.random.Generator(np.random.Philox(key=key, counter=position)).random()
    end = np.cumsum(likely[order])[order == event.token_id].item()
    assert end - likely[event.token_id] - NEAR < number < end + NEAR


def test_random_traffic_brings_what_the_reference_says():
    counts = Counter()
    for number in range(9):
        rng = random.Random(number)
        oracle = hugging_face(TINY[rng.choice(list(TINY))], number)
        model = ours(oracle)
        model.set_deterministic(rng.random() < 0.3)
        engine = random_engine(rng, model, number)
        room = min(engine.scheduler.limits.max_context, engine.scheduler.pool.num_blocks * BLOCK_SIZE)
        trunk = [rng.randrange(2, VOCAB) for _ in range(50)]
        requests = [random_request(rng, f"{number}.{place}", trunk, room) for place in range(8)]
        traffic = Traffic(rng, engine, requests)
        traffic.run()
        assert_right(traffic, oracle.state_dict(), plain_config(oracle), room)
        counts += traffic.counts
    assert min(counts[what] for what in ("preempted", "cached", "guessed", "cancelled")) > 9, counts
