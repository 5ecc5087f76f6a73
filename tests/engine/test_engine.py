"""One answer whatever happens: alone, batched, chunked, from the prefix cache, preempted, guessed, forked.

Tokens are compared as they are; log probabilities to 1e-4, and with transformers' own to 1e-4.
"""

import math
import random
from dataclasses import replace

import pytest
import torch

from llama.engine.draft import DraftModel
from llama.engine.engine import BLOCK_SIZE
from llama.engine.limits import Limits
from llama.engine.propose import PromptLookup
from tests.engine.running import TINY, alone, engine_of, expected_ids, logits, run
from tests.engine.simulation import request
from tests.model.pairs import hugging_face, ours

TOLERANCE = 1e-4


def requests():
    """Greedy and seeded, with all that shapes a draw; prompts that begin alike, or repeat themselves."""
    rng = random.Random(0)
    trunk = [rng.randrange(2, 181) for _ in range(40)]
    chosen = [
        {"max_tokens": 40}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9, "prompt_logprobs": 2},
        {"temperature": 0.9, "top_k": 20, "n": 3, "frequency_penalty": 1.0}, {"repetition_penalty": 1.3},
        {"n": 2, "prompt_logprobs": 0},
        {"temperature": 1.0, "frequency_penalty": 0.8, "presence_penalty": 0.4, "min_p": 0.02},
        {"temperature": 0.2, "max_tokens": 40}, {"logit_bias": {1: 100}, "min_tokens": 6},
        {"temperature": 0.6, "stop_token_ids": tuple(range(60, 140)), "min_tokens": 3}, {"max_tokens": 1},
        {"temperature": 1.0, "seed": -5, "logit_bias": {7: 30.0, 9: 29.0}, "max_tokens": 40},
    ]
    made = []
    for number, one in enumerate(chosen):
        own = [rng.randrange(2, 181) for _ in range(rng.randrange(1, 50))]
        prompt = (trunk[:rng.randrange(17, 41)] + own[:9], own, own[:5] * 6)[number % 3]
        usual = {"seed": number, "max_tokens": 24, "ignore_eos": "min_tokens" not in one, "logprobs": 3}
        made.append(request(f"r{number}", prompt, **{**usual, **one}))
    return made


REQUESTS = requests()


@pytest.fixture(scope="module", params=TINY)
def oracle(request):
    """transformers' model of one ratio of heads."""
    return hugging_face(TINY[request.param])


@pytest.fixture(scope="module")
def model(oracle):
    """Ours, with the same weights."""
    return ours(oracle)


@pytest.fixture(scope="module")
def plain(model):
    """Every request by itself."""
    return alone(model, REQUESTS)


def assert_same(run, plain, requests=REQUESTS):
    assert run.ids == plain.ids
    assert run.reasons == plain.reasons
    names = [[token.token_id for token in run.prompts[one.id]] for one in requests]
    assert names == [[*one.prompt_ids] if one.params.prompt_logprobs is not None else [] for one in requests]
    values, expected = run.values(), plain.values()
    assert len(values) == len(expected) and not any(map(math.isnan, values))
    assert max(abs(one - other) for one, other in zip(values, expected)) < TOLERANCE


# ---- alone, by transformers --------------------------------------------------------------------------------


def test_every_token_is_what_transformers_logits_say(oracle, plain):
    for one in REQUESTS:
        for index in range(one.params.n):
            assert plain.ids[one.id, index] == expected_ids(oracle, one, index), f"{one.id} sample {index}"


@pytest.mark.parametrize("name, options", [("r0", {}), ("r4", {"repetition_penalty": 1.3})])
def test_greedy_is_transformers_generate(oracle, plain, name, options):
    [one] = [one for one in REQUESTS if one.id == name]
    prompt = torch.tensor([one.prompt_ids])
    generated = oracle.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                                pad_token_id=0, eos_token_id=None, max_new_tokens=one.params.max_tokens,
                                **options)
    assert plain.ids[name, 0] == generated[0, prompt.shape[1]:].tolist()


def test_log_probabilities_are_transformers(oracle, plain):
    for one in REQUESTS:
        start = len(one.prompt_ids)
        for index in range(one.params.n):
            tokens = plain.samples[one.id, index]
            rows = logits(oracle, [*one.prompt_ids, *plain.ids[one.id, index]]).log_softmax(-1)
            assert_scores(tokens, rows[start - 1:], 3)
        if one.params.prompt_logprobs is not None:
            first, *others = plain.prompts[one.id]
            assert (first.token_id, first.logprob, first.top) == (one.prompt_ids[0], None, ())
            assert len(others) == start - 1
            assert_scores(others, rows, one.params.prompt_logprobs)


def assert_scores(tokens, rows, num_alternatives):
    for token, row in zip(tokens, rows):
        assert token.logprob == pytest.approx(row[token.token_id].item(), abs=TOLERANCE)
        values = pytest.approx([value for _, value in token.top], abs=TOLERANCE)
        assert row.topk(num_alternatives)[0].tolist() == values
        assert [row[token_id].item() for token_id, _ in token.top] == values


def test_the_workload_covers_every_end(plain):
    reasons = {reason for reason, _ in plain.reasons.values()}
    stops = {stop for _, stop in plain.reasons.values()}
    assert reasons == {"stop", "length"} and None in stops and len(stops) > 1
    assert plain.ids["r8", 0].index(1) == 6 == len(plain.ids["r8", 0]) - 1


# ---- in company --------------------------------------------------------------------------------------------


def test_batched(model, plain):
    assert_same(run(engine_of(model, Limits(512), 400), REQUESTS), plain)


def test_chunked(model, plain):
    found = run(engine_of(model, Limits(512, step_tokens=7, mixed_step_tokens=5), 400), REQUESTS)
    assert_same(found, plain)
    assert found.counts["steps"] > 60


def test_arriving_one_after_another_while_others_are_cancelled(model, plain):
    company = [replace(one, id=f"gone {one.id}") for one in REQUESTS]
    mixed = [one for pair in zip(REQUESTS, company) for one in pair]
    engine = engine_of(model, Limits(512, mixed_step_tokens=24), 400)
    found = run(engine, mixed, every=2, cancel={one.id: 4 * number + 9 for number, one in enumerate(company)})
    for results in (found.samples, found.reasons):
        for key in [key for key in results if key[0].startswith("gone")]:
            del results[key]
    for key in [key for key in found.prompts if key.startswith("gone")]:
        del found.prompts[key]
    assert_same(found, plain)


def test_from_the_prefix_cache(model, plain):
    engine = engine_of(model, Limits(512), 400)
    first, second = run(engine, REQUESTS), run(engine, REQUESTS)
    assert_same(second, plain)
    full = sum((len(one.prompt_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE for one in REQUESTS
               if one.params.prompt_logprobs is None)
    assert second.counts["cached"] == full > first.counts["cached"]


@pytest.mark.parametrize("prefix_sharing", [True, False])
def test_preempted(model, plain, prefix_sharing):
    found = run(engine_of(model, Limits(512, step_tokens=48), 8, prefix_sharing=prefix_sharing), REQUESTS)
    assert_same(found, plain)
    assert found.counts["preempted"] > 3


def test_guessed_by_prompt_lookup(model, plain):
    found = run(engine_of(model, Limits(512), 400, proposer=PromptLookup(min_ngram=1)), REQUESTS)
    assert_same(found, plain)
    assert found.counts["accepted"] > 20


@pytest.mark.parametrize("is_right", [True, False])
def test_guessed_by_a_draft_model(model, plain, is_right):
    draft = model if is_right else ours(hugging_face(TINY["3:3"], seed=7))
    proposer = DraftModel(draft, 60, BLOCK_SIZE)
    found = run(engine_of(model, Limits(512), 400, proposer=proposer), REQUESTS)
    assert_same(found, plain)
    assert proposer.pool.num_held == 0
    assert not is_right or found.counts["accepted"] > 100


def test_everything_at_once(model, plain):
    limits = Limits(512, max_running=6, step_tokens=9, mixed_step_tokens=12)
    engine = engine_of(model, limits, 9, proposer=PromptLookup(min_ngram=1))
    for found in (run(engine, REQUESTS, every=3), run(engine, REQUESTS)):
        assert_same(found, plain)
        assert min(found.counts[what] for what in ("preempted", "accepted", "cached")) > 2


def test_samples_are_those_of_fewer(model, plain):
    for one in REQUESTS:
        if one.params.n > 1:
            single = replace(one, params=replace(one.params, n=1))
            found = alone(model, [single])
            assert found.ids[one.id, 0] == plain.ids[one.id, 0]
            samples = [tuple(plain.ids[one.id, index]) for index in range(one.params.n)]
            assert len(set(samples)) == (1 if one.params.temperature == 0 else one.params.n)
