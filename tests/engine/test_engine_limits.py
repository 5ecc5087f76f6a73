"""llama.engine.engine: what it refuses, what it holds in memory, and answers that are the same bits."""

import itertools
import weakref
from collections import defaultdict
from dataclasses import replace
from functools import partial

import pytest
import torch

from llama.engine import engine as engine_module
from llama.engine.engine import SCORED_ROWS
from llama.engine.limits import Limits
from llama.engine.propose import PromptLookup
from llama.engine.request import RequestError, StepError, TokenEvent
from llama.engine.sampler import draw
from llama.model.linear import make_linear
from llama.model.transformer import FeedForward
from tests.engine.running import TINY, alone, engine_of, run
from tests.engine.simulation import request
from tests.engine.test_engine import REQUESTS, assert_same
from tests.model.pairs import hugging_face, ours, random_ids


@pytest.fixture(scope="module")
def model():
    """A tiny one, 4:1 heads."""
    return ours(hugging_face(TINY["8:2"]))


@pytest.mark.parametrize("field, prompt, chosen", [
    ("prompt", [5, 181], {}), ("prompt", [-1], {}), ("logit_bias", [5], {"logit_bias": {181: 1.0}}),
    ("stop_token_ids", [5], {"stop_token_ids": (5, 181)})])
def test_an_id_outside_the_vocabulary_is_refused_by_its_field(model, field, prompt, chosen):
    engine = engine_of(model, Limits(64), 8)
    with pytest.raises(RequestError) as refusal:
        engine.submit(request("r", prompt, **chosen))
    wrong = -1 if prompt == [-1] else 181
    assert str(refusal.value) == f"{field} has the id {wrong}, which is outside the vocabulary of 181 tokens"
    assert refusal.value.field == field and not engine.has_work


def test_a_step_without_work_is_nothing(model):
    engine = engine_of(model, Limits(64), 8)
    assert engine.step() == [] and not engine.cancel("r")


def test_min_tokens_forbids_every_end_and_no_longer(model):
    engine = engine_of(model, Limits(64), 8)
    found = run(engine, [request("r", [5, 6], logit_bias={1: 100, 9: 50}, stop_token_ids=(9,), min_tokens=4,
                                 max_tokens=9, logprobs=0)])
    [ids] = found.ids.values()
    assert len(ids) == 5 and ids[-1] == 1 and {1, 9}.isdisjoint(ids[:-1])


def test_guesses_are_drawn_with_the_penalties_of_the_guesses_before_them(model):
    """A bias brings one token again and again, until its frequency outweighs it: amid a draft."""
    one = request("r", [7] * 20, logit_bias={7: 40, 8: 20}, frequency_penalty=2.0, max_tokens=30,
                  ignore_eos=True, logprobs=0)
    guessed = run(engine_of(model, Limits(64), 8, proposer=PromptLookup(min_ngram=1)), [one])
    assert guessed.ids == alone(model, [one]).ids
    assert guessed.counts["accepted"] and len(set(guessed.ids["r", 0])) > 1


def test_min_tokens_counts_guesses(model):
    """A draft that reaches past min_tokens is banned from ending up to there, and free to end after."""
    class Ends:
        def propose(self, sequence, most):
            return (1,) * min(most, 3)

        def forget(self, sequence):
            pass

    one = request("r", [5, 6], logit_bias={1: 100}, min_tokens=3, max_tokens=9, logprobs=0)
    guessed = run(engine_of(model, Limits(64), 8, proposer=Ends()), [one])
    assert guessed.ids == alone(model, [one]).ids
    assert guessed.ids["r", 0].index(1) == 3


def test_the_ids_of_a_prompt_are_gathered_once_for_all_its_tokens(model, monkeypatch):
    """Which ids a repetition penalty looks at: where there is none, they are not gathered at all."""
    seen = defaultdict(list)

    def observed(logits, rows):
        for row in rows:
            seen[row.seed].append(row.prompt_ids)
        return draw(logits, rows)

    monkeypatch.setattr(engine_module, "draw", observed)
    prompt = [9, 5, 5, 7] * 10
    run(engine_of(model, Limits(512, step_tokens=7), 40, proposer=PromptLookup(min_ngram=1)), [
        request("penalised", prompt, seed=1, repetition_penalty=1.2, max_tokens=6, ignore_eos=True, logprobs=0),
        request("plain", prompt, seed=2, max_tokens=6, ignore_eos=True, logprobs=0)])
    assert [ids.tolist() for ids in seen[1]] == [[5, 7, 9]] * len(seen[1]) and len(seen[1]) >= 6
    assert len(set(map(id, seen[1]))) == 1 and not any(map(len, seen[2]))


def test_scoring_a_prompt_holds_few_rows_of_logits(model, monkeypatch):
    """Never more than SCORED_ROWS at once, nor a piece beside the one before it; and each row once."""
    held, most, total = [], 0, 0
    compute = model.logits

    def counted(hidden, at):
        nonlocal most, total
        logits = compute(hidden, at)
        held.append(weakref.ref(logits))
        rows = [len(one()) for one in held if one() is not None]
        most, total = max(most, sum(rows)), total + len(logits)
        return logits

    monkeypatch.setattr(model, "logits", counted)
    prompt = random_ids(3 * SCORED_ROWS + 50)
    engine = engine_of(model, Limits(512), 40)
    found = run(engine, [request("r", prompt, prompt_logprobs=1, logprobs=0, max_tokens=3, ignore_eos=True)])
    assert len(found.prompts["r"]) == len(prompt)
    assert most == SCORED_ROWS and total == len(prompt) - 1 + 3


def test_logits_are_computed_where_they_are_asked_for_alone(model, monkeypatch):
    rows = []
    compute = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden, at: rows.append(len(hidden)) or compute(hidden, at))
    one = request("r", random_ids(100), n=3, max_tokens=2, ignore_eos=True, logprobs=0)
    run(engine_of(model, Limits(512, step_tokens=40), 40), [one])
    assert rows == [1, 3]


def test_a_cancel_between_steps_stops_the_events(model):
    engine = engine_of(model, Limits(64), 16)
    for name in "ab":
        engine.submit(request(name, [5, 6, 7], max_tokens=8, ignore_eos=True, n=2))
    engine.step()
    assert engine.cancel("a", 1) and engine.cancel("b")
    events = [event for _ in range(7) for event in engine.step()]
    assert {(event.request_id, event.index) for event in events} == {("a", 0)} and not engine.has_work
    assert all(isinstance(event, TokenEvent) for event in events)


def test_other_salts_compute_their_own(model):
    engine = engine_of(model, Limits(512), 60)
    prompt = random_ids(64)
    first = run(engine, [request("a", prompt, "one", max_tokens=4, ignore_eos=True, logprobs=1)])
    other = run(engine, [request("a", prompt, "two", max_tokens=4, ignore_eos=True, logprobs=1)])
    again = run(engine, [request("a", prompt, "one", max_tokens=4, ignore_eos=True, logprobs=1)])
    assert (first.counts["cached"], other.counts["cached"], again.counts["cached"]) == (0, 0, 48)
    assert first.ids == other.ids == again.ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_deterministic_is_the_same_bits(dtype):
    model = ours(hugging_face(TINY["8:2"]).to(dtype))
    model.set_deterministic(True)
    workload = [replace(one, params=replace(one.params, prompt_logprobs=1)) if place % 2 else one
                for place, one in enumerate(REQUESTS)]
    plain = alone(model, workload)
    lookup = PromptLookup(min_ngram=1)
    for limits, num_blocks, proposer in ((Limits(512), 400, None), (Limits(512, step_tokens=7), 400, lookup),
                                         (Limits(512, max_running=6, mixed_step_tokens=16), 9, lookup)):
        found = run(engine_of(model, limits, num_blocks, proposer=proposer), workload)
        assert found.samples == plain.samples and found.prompts == plain.prompts


@pytest.fixture(params=[2, 3, 5])
def threads(request):
    """Elsewhere there is one, or as many as the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def test_deterministic_is_the_same_bits_however_threads_share_the_work(threads, model):
    """More elements than one thread takes alone, in shares that end amid a vector."""
    config = replace(model.config, hidden_size=500, intermediate_size=500)
    layer = FeedForward(config, partial(make_linear, dtype=torch.float32, device="cpu"))
    for module in layer.modules():
        module.deterministic = True
    x = torch.randn(110, 500, generator=torch.Generator().manual_seed(0))
    layer.gate_up.weight.normal_(generator=torch.Generator().manual_seed(1))
    layer.down.weight.copy_(torch.eye(500))  # so that no sum hides a bit
    by_itself = torch.cat([layer(row) for row in x.split(1)])
    for tokens in range(70, 110):
        assert torch.equal(layer(x[:tokens]), by_itself[:tokens])


class Failure(RuntimeError):
    """What the tests below let a step end with."""


def failing(function, every):
    """The function, which has done its work when it fails."""
    calls = itertools.count(1)

    def call(*args):
        result = function(*args)
        if next(calls) % every == 0:
            raise Failure
        return result

    return call


@pytest.mark.parametrize("where, every", [("propose", 23), ("hidden", 3), ("draw", 3)])
def test_a_step_that_fails_is_done_again_as_if_it_had_not_been(monkeypatch, where, every):
    """While guessing, computing or sampling; the blocks that samples share are copied in spite of it."""
    model, lookup = ours(hugging_face(TINY["8:2"])), PromptLookup(min_ngram=1)
    plain = alone(model, REQUESTS)
    owner = {"propose": lookup, "hidden": model, "draw": engine_module}[where]
    monkeypatch.setattr(owner, where, failing(getattr(owner, where), every))
    engine = engine_of(model, Limits(512, step_tokens=40), 14, proposer=lookup)
    step, failures = engine.step, 0

    def persistent():
        nonlocal failures
        while True:
            try:
                return step()
            except StepError as error:
                assert isinstance(error.__cause__, Failure)
                engine.check()
                failures += 1

    monkeypatch.setattr(engine, "step", persistent)
    assert_same(run(engine, REQUESTS), plain)
    assert failures > 5


def test_who_cannot_guess_for_one_can_go_on_with_the_others(model):
    class Fails:
        def propose(self, sequence, most):
            if sequence.request.id == "bad":
                raise Failure
            return (7,)[:most]

        def forget(self, sequence):
            pass

    good, bad = (request(name, [5, 6], max_tokens=8, ignore_eos=True, logprobs=0) for name in ("good", "bad"))
    engine = engine_of(model, Limits(64), 16, proposer=Fails())
    for one in (good, bad):
        engine.submit(one)
    events = engine.step()
    while engine.scheduler.running[0].request.id == "good":
        with pytest.raises(StepError) as failure:
            engine.step()
        assert failure.value.request_ids == ("good", "bad")
        events += engine.step({"good"})
    ids = [event.token_id for event in events if isinstance(event, TokenEvent) and event.request_id == "good"]
    assert ids == alone(model, [good]).ids["good", 0]
    assert engine.cancel("bad") and engine.scheduler.pool.num_held == 0
