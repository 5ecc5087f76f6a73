"""Constrained decoding in the engine, by a constraint of our own: what transformers' logits and processors say
when everything that it forbids has no chance."""

import random
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from llama.engine.draft import DraftModel
from llama.engine.engine import BLOCK_SIZE, Engine
from llama.engine.limits import Limits
from llama.engine.propose import PromptLookup
from llama.engine.request import RequestError, TokenEvent
from llama.engine.sampler import SampleRow, adjust
from tests.engine.processors import kept_distribution
from tests.engine.running import EOS, TINY, alone, engine_of, logits, run
from tests.engine.simulation import request
from tests.model.pairs import hugging_face, ours

VOCAB = 181
CONTEXT = 512


class Steps:
    """A language of ids: each is the one before plus 1 to 9, the first is below 30, the last above 150; or, with
    `length`, it has so many. The `grammar` "steps" or "steps LENGTH"."""

    def __init__(self, grammar, ids=(), is_over=False):
        name, *rest = grammar.split()
        if name != "steps":
            raise ValueError(f"grammar is {grammar!r}, which is none")
        self.grammar, self.ids, self.is_over = grammar, list(ids), is_over
        self.length = int(rest[0]) if rest else None

    def allowed(self, ids):
        """Which ids may follow these: a set that is never empty."""
        last = ids[-1] if ids else 20
        further = {one for one in range(last + 1, last + 10) if one < VOCAB}
        if self.length is not None:
            return set(EOS) if len(ids) == self.length else further or {last}
        return (further if last < 170 else set()) | (set(EOS) if last > 150 else set())

    def masks(self, guesses=()):
        rows = []
        for count in range(len(guesses) + 1):
            bits = np.zeros(VOCAB + 11, dtype=np.uint8)  # more bits than the model has rows
            bits[list(self.allowed([*self.ids, *guesses[:count]]))] = 1
            rows.append(np.packbits(bits, bitorder="little"))
        return np.stack(rows)

    def num_allowed(self, guesses):
        for count, guess in enumerate(guesses):
            if guess in EOS or guess not in self.allowed([*self.ids, *guesses[:count]]):
                return count
        return len(guesses)

    def accept(self, token_id):
        self.ids.append(token_id)
        self.is_over = token_id in EOS

    def fork(self):
        return Steps(self.grammar, self.ids, self.is_over)


def requests():
    """Greedy and seeded, filtered and not; prompts that begin alike and repeat themselves."""
    rng = random.Random(1)
    trunk = [rng.randrange(2, VOCAB) for _ in range(40)]
    rising = [*range(20, 150, 3)] * 2
    chosen = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.5, "n": 3}, {"temperature": 1.0, "top_k": 3},
              {"temperature": 1.0, "min_p": 0.3, "frequency_penalty": 1.0}, {"logit_bias": {1: 100.0, 40: 50.0}},
              {"grammar": None, "temperature": 1.0}, {"temperature": 1.0, "prompt_logprobs": 1, "n": 2},
              {"repetition_penalty": 1.4}, {"grammar": "steps 5", "min_tokens": 9}]
    made = []
    for number, one in enumerate(chosen):
        prompt = (trunk + [number], rising[:60 + number], trunk[:number + 1])[number % 3]
        usual = {"seed": number, "max_tokens": 40, "logprobs": 3, "grammar": "steps"}
        made.append(request(f"r{number}", prompt, **{**usual, **one}))
    return made


REQUESTS = requests()


@pytest.fixture(scope="module")
def oracle():
    return hugging_face(TINY["8:2"])


@pytest.fixture(scope="module")
def model(oracle):
    return ours(oracle)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """Every engine of this module compiles with Steps."""
    made = Engine.__init__

    def with_compiler(self, *args, compiler=Steps, **options):
        made(self, *args, **options, compiler=compiler)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "__init__", with_compiler)
        yield


@pytest.fixture(scope="module")
def plain(model):
    return alone(model, REQUESTS)


def assert_same(result, plain):
    assert result.ids == plain.ids and result.reasons == plain.reasons
    values, expected = result.values(), plain.values()
    assert len(values) == len(expected)
    assert max(abs(one - other) for one, other in zip(values, expected)) < 1e-4


def test_every_token_is_what_transformers_logits_say_of_those_that_may_come(oracle, plain):
    """Penalties and biases first, then what is forbidden; by an argmax, or the inverse transform in numpy."""
    for one in REQUESTS:
        if one.params.grammar != "steps" or one.params.frequency_penalty or one.params.repetition_penalty != 1:
            continue
        for index in range(one.params.n):
            steps, ids = Steps("steps"), list(one.prompt_ids)
            for token in plain.samples[one.id, index]:
                scores = logits(oracle, ids)[-1].double().clone()
                for token_id, bias in one.params.logit_bias.items():
                    scores[token_id] += bias
                scores[[each for each in range(VOCAB) if each not in steps.allowed(steps.ids)]] = -torch.inf
                assert token.token_id == drawn(scores, one.params, index, len(ids))
                expected = logits(oracle, ids)[-1].log_softmax(-1)  # of the raw logits, forbidden ones too
                assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-4)
                assert [each for each, _ in token.top] == expected.topk(3).indices.tolist()
                ids.append(token.token_id)
                steps.accept(token.token_id)
            assert steps.is_over and plain.reasons[one.id, index] == ("stop", None)


def drawn(scores, params, index, position):
    if params.temperature == 0:
        return int(scores.argmax())
    likely = kept_distribution(scores, params)
    is_filtered = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
    order = np.argsort(-likely, kind="stable") if is_filtered else np.arange(len(likely))
    key = np.array([params.seed, index], dtype=np.uint64)
    share = np.random.Generator(np.random.Philox(key=key, counter=position)).random()
    return int(order[np.searchsorted(np.cumsum(likely[order]), share, side="right")])


def test_one_answer_in_company(model, plain):
    assert_same(run(engine_of(model, Limits(CONTEXT), 1200), REQUESTS), plain)
    assert_same(run(engine_of(model, Limits(CONTEXT, step_tokens=5, mixed_step_tokens=3), 1200), REQUESTS, every=2), plain)


def test_one_answer_after_preemptions(model, plain):
    result = run(engine_of(model, Limits(CONTEXT), 30), REQUESTS)
    assert result.counts["preempted"] > 1
    assert_same(result, plain)


class Rising:
    """Guesses the next ids, and now and then what the constraint forbids, or the end."""

    def propose(self, sequence, most):
        last = sequence.ids[-1]
        return tuple((min(last + 1, VOCAB - 1), min(last + 4, VOCAB - 1), EOS[0], 7, 9))[len(sequence.ids) % 2:][:most]

    def forget(self, sequence):
        pass


@pytest.mark.parametrize("proposer", ["lookup", "model", "rising"])
def test_guesses_change_nothing_and_are_cut_where_they_are_forbidden(model, plain, proposer):
    made = {"lookup": PromptLookup(1, give_up=0.0), "rising": Rising(),
            "model": DraftModel(model, 1200, BLOCK_SIZE)}[proposer]
    seen, propose = [], made.propose
    made.propose = lambda sequence, most: seen.append(propose(sequence, most)) or seen[-1]
    engine = engine_of(model, Limits(CONTEXT), 1200, proposer=made)
    planned, plan = [], engine.scheduler.plan
    engine.scheduler.plan = lambda *only: planned.append(plan(*only)) or planned[-1]
    result = run(engine, REQUESTS)
    assert_same(result, plain)
    drafts = [item for each in planned for item in each.scheduled if item.draft and item.sequence.constraint]
    assert sum(map(len, seen)) > sum(len(item.draft) for each in planned for item in each.scheduled)
    assert result.counts["accepted"] > 0 or proposer == "lookup"
    assert all(EOS[0] not in item.draft for item in drafts)


def test_a_text_that_is_whole_ends_also_before_min_tokens(plain):
    ids = plain.ids["r9", 0]
    assert len(ids) == 6 and ids[-1] in EOS and plain.reasons["r9", 0] == ("stop", None)


def test_where_there_is_a_choice_min_tokens_forbids_the_end(model):
    short, long = (run(engine_of(model, Limits(CONTEXT), 64), [request(
        "r", [5, 6], grammar="steps", logit_bias={1: 100.0, **dict.fromkeys(range(21, 181), 0.0)}, max_tokens=60,
        min_tokens=count, logprobs=0)]).ids["r", 0] for count in (0, 30))
    assert short[-1] == long[-1] == 1 and max(short[:-2]) <= 150 < short[-2]
    assert len(short) < len(long)


def test_stop_ids_and_limits_end_a_constrained_text_too(model):
    made = [request("stop", [5, 6], grammar="steps", stop_token_ids=tuple(range(40, 60)), max_tokens=60, logprobs=0),
            request("length", [5, 6], grammar="steps", max_tokens=3, logprobs=0)]
    result = run(engine_of(model, Limits(CONTEXT), 64), made)
    assert result.reasons["stop", 0] == ("stop", result.ids["stop", 0][-1]) and 40 <= result.ids["stop", 0][-1] < 60
    assert result.reasons["length", 0] == ("length", None) and len(result.ids["length", 0]) == 3


# ---- compiling ---------------------------------------------------------------------------------------------


def to_the_end(engine):
    events = []
    for _ in range(400):
        events += engine.step()
    assert not engine.has_work
    return [event for event in events if isinstance(event, TokenEvent)]


def test_the_prompt_is_computed_and_others_go_on_while_a_grammar_is_compiled(model):
    ready = threading.Event()

    def compile(grammar):
        assert ready.wait(30)
        return Steps(grammar)

    engine = engine_of(model, Limits(CONTEXT), 64, compiler=compile)
    engine.submit(request("slow", [*range(2, 42)], grammar="steps 3", max_tokens=9))
    engine.submit(request("other", [3], max_tokens=5, ignore_eos=True))
    events = []
    while len(events) < 5:
        events += [event for event in engine.step() if isinstance(event, TokenEvent)]
    assert {event.request_id for event in events} == {"other"}
    [slow] = engine.scheduler.running
    assert (slow.num_computed, slow.num_pending) == (39, 1)
    assert engine.step() == []
    ready.set()
    assert [event.request_id for event in to_the_end(engine)] == ["slow"] * 4


def test_a_grammar_that_is_none_ends_its_request_alone(model):
    engine = engine_of(model, Limits(CONTEXT), 64)
    engine.submit(request("bad", [3, 4], grammar="nonsense", n=2))
    engine.submit(request("good", [3, 4], grammar="steps 2", max_tokens=9))
    events = to_the_end(engine)
    bad = [event for event in events if event.request_id == "bad"]
    assert [(event.index, event.finish_reason, event.field) for event in bad] == [
        (0, "error", "grammar"), (1, "error", "grammar")]
    assert bad[0].error == "grammar is 'nonsense', which is none"
    assert [event.finish_reason for event in events if event.request_id == "good"] == [None, None, "stop"]
    assert engine.scheduler.pool.num_held == 0


def test_a_request_that_is_cancelled_while_its_grammar_is_compiled_is_gone(model):
    ready = threading.Event()
    engine = engine_of(model, Limits(CONTEXT), 64, compiler=lambda grammar: ready.wait(30) and Steps(grammar))
    engine.submit(request("r", [3, 4], grammar="nonsense"))
    engine.step()
    assert engine.cancel("r") and not engine.has_work
    ready.set()
    assert to_the_end(engine) == [] and engine.step() == []


class Exhausted(Steps):
    """Takes more than it may, after three ids."""

    def masks(self, guesses=()):
        if len(self.ids) == 3:
            raise ValueError("grammar takes more than it may")
        return super().masks(guesses)

    def fork(self):
        return Exhausted(self.grammar, self.ids, self.is_over)


def test_a_grammar_that_fails_on_the_way_ends_its_request_and_nobody_elses(model):
    engine = engine_of(model, Limits(CONTEXT), 64,
                       compiler=lambda grammar: (Exhausted if grammar == "steps 8" else Steps)(grammar))
    engine.submit(request("bad", [3, 4], grammar="steps 8", max_tokens=9))
    others = [request("good", [3, 4], grammar="steps 6", max_tokens=9, logprobs=0),
              request("free", [9], max_tokens=9, logprobs=0)]
    for one in others:
        engine.submit(one)
    events = to_the_end(engine)
    bad = [event for event in events if event.request_id == "bad"]
    assert [event.finish_reason for event in bad] == [None, None, None, "error"]
    assert (bad[-1].field, bad[-1].error) == ("grammar", "grammar takes more than it may")
    for one in others:
        ids = [event.token_id for event in events if event.request_id == one.id]
        assert ids == alone(model, [one]).ids[one.id, 0]


def test_an_engine_without_a_compiler_takes_no_grammar(model):
    engine = engine_of(model, Limits(CONTEXT), 64, compiler=None)
    with pytest.raises(RequestError, match="was made without a compiler") as caught:
        engine.submit(request("r", [3], grammar="steps"))
    assert caught.value.field == "grammar"


@pytest.mark.parametrize(("fields", "field"), [
    ({"grammar": 1}, "grammar"), ({"grammar": "steps", "ignore_eos": True}, "ignore_eos")])
def test_what_does_not_go_with_a_grammar_is_refused(fields, field):
    with pytest.raises(RequestError) as caught:
        replace(REQUESTS[0].params, **fields)
    assert caught.value.field == field


# ---- masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 8, 29, 181])
def test_masks_of_some_rows_forbid_what_they_leave_out_and_touch_no_other(vocab):
    rng = np.random.default_rng(vocab)
    scores = torch.from_numpy(rng.standard_normal((5, vocab)).astype(np.float32))
    kept = rng.random((5, vocab + 13)) < 0.5
    masks = [np.packbits(bits, bitorder="little") for bits in kept]
    masks[1] = None
    masks[3] = masks[3][:max(1, vocab // 16)]  # a vocabulary with fewer ids than the model has rows
    rows = [SampleRow(REQUESTS[0].params, 0, 0, 0, mask=mask) for mask in masks]
    adjusted, before = adjust(scores, rows), scores.clone()
    for place, mask in enumerate(masks):
        for token_id in range(vocab):
            allowed = mask is None or token_id < 8 * len(mask) and kept[place, token_id]
            assert adjusted[place, token_id] == (scores[place, token_id] if allowed else -torch.inf)
    assert torch.equal(scores, before)
