"""server.isolate on the real engine: whoever is not at fault gets exactly the tokens of a faultless run."""

import random

import pytest
import torch

from llama.config import LlamaConfig
from llama.engine.engine import BLOCK_SIZE, Engine
from llama.engine.limits import Limits
from llama.engine.propose import PromptLookup
from llama.engine.request import PromptEvent, Request, SamplingParams, StepError
from llama.model.transformer import Llama
from server import isolate

CONFIG = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4,
                     num_kv_heads=2, head_dim=8, max_position_embeddings=256, rope_theta=10000.0,
                     rope_scaling=None, rms_norm_eps=1e-5, tie_word_embeddings=True, dtype="float32")


class Faulty(Engine):
    """Fails, now before the model and now after it, in a step that brings one of `faults` to that length.

    The step leaves nonsense wherever it was to write.
    """

    faults: dict[str, int] = {}

    def _run(self, plan):
        at_fault = [item for item in plan.scheduled
                    if item.start + item.length >= self.faults.get(item.sequence.request.id, 1 << 30)]
        if not at_fault:
            return super()._run(plan)
        if len(self.scheduler.running) % 2:
            raise MemoryError("before")
        super()._run(plan)
        for item in plan.scheduled:
            for position in range(item.start, item.start + item.length):
                slot = item.sequence.table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
                self.cache.keys[:, slot] = self.cache.values[:, slot] = 7.0
        raise MemoryError("after")


def params(**chosen):
    """With every default filled."""
    plain = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
    return SamplingParams(**{**plain, **chosen})


def requests_of(rng):
    shared = [rng.randrange(61) for _ in range(40)]
    for number in range(rng.randint(2, 9)):
        prompt = shared[:rng.choice([0, 17, 40])] + [rng.randrange(61) for _ in range(rng.randint(1, 30))]
        yield Request(f"r{number}", tuple(prompt), params(
            max_tokens=rng.randint(1, 24), temperature=rng.choice([0.0, 1.0]),
            repetition_penalty=rng.choice([1.0, 1.3]), seed=number, n=rng.choice([1, 1, 3]), logprobs=0,
            prompt_logprobs=rng.choice([None, None, 2]), ignore_eos=True))


def run(engine, requests):
    events, culprits = {}, {}
    for one in requests:
        engine.submit(one)
    while engine.has_work:
        brought, found = isolate.step(engine)
        culprits |= found
        for event in brought:
            index = None if isinstance(event, PromptEvent) else event.index
            events.setdefault((event.request_id, index), []).append(event)
    return events, culprits


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    built = Llama(CONFIG)
    for weight in built.parameters():
        torch.nn.init.normal_(weight, 0, 0.4) if weight.dim() > 1 else torch.nn.init.ones_(weight)
    return built


@pytest.mark.parametrize("seed", range(16))
def test_nobody_else_notices(model, seed):
    rng = random.Random(seed)
    requests = list(requests_of(rng))
    faults = {one.id: rng.randint(1, len(one.prompt_ids) + one.params.max_tokens - 1) for one in requests
              if rng.random() < 0.4}
    limits = Limits(max_context=128, max_running=rng.choice([4, 64]), step_tokens=rng.choice([24, 512]),
                    mixed_step_tokens=rng.choice([20, 128]))
    right, _ = run(Engine(model, limits, num_blocks=64), requests)
    engine = Faulty(model, limits, rng.choice([14, 64]), proposer=PromptLookup() if seed % 3 == 0 else None,
                    prefix_sharing=rng.random() < 0.7)
    engine.faults = faults
    events, culprits = run(engine, requests)
    engine.check()
    assert culprits.keys() == faults.keys()
    for (name, index), wanted in right.items():
        got = events.get((name, index), [])
        if index is None:
            got, wanted = ([scored.token_id for event in group for scored in event.logprobs]
                           for group in (got, wanted))
            assert got == (wanted[:len(got)] if name in faults else wanted)
            continue
        assert [event.token_id for event in got] == [event.token_id for event in wanted][:len(got)]
        assert [event.logprob.logprob for event in got] == pytest.approx(
            [event.logprob.logprob for event in wanted][:len(got)], abs=1e-4)
        if name not in faults:
            assert [event.finish_reason for event in got] == [event.finish_reason for event in wanted]


def test_blocks_that_were_to_be_copied_are_copied(model):
    """In the step that fails before the model, two of three samples leave the block of their prompt's end."""
    prompt = tuple(range(20))
    shared = Request("r0", prompt, params(max_tokens=6, temperature=1.0, seed=3, n=3))
    right, _ = run(Engine(model, Limits(max_context=128), 64), [shared])
    engine = Faulty(model, Limits(max_context=128), 64)
    at_fault = [Request(name, prompt[:3], params(max_tokens=6)) for name in ("r1", "r2")]
    engine.faults = {"r1": 4, "r2": 5}
    events, culprits = run(engine, [shared, *at_fault])
    assert list(culprits) == ["r1", "r2"]
    assert [[event.token_id for event in events["r0", index]] for index in range(3)] == [
        [event.token_id for event in right["r0", index]] for index in range(3)]


def test_a_step_error_names_whom_it_was_for(model):
    engine = Faulty(model, Limits(max_context=128), 64)
    engine.faults = {"r1": 1}
    for name in ("r0", "r1"):
        engine.submit(Request(name, (1, 2), params(max_tokens=2, n=2)))
    with pytest.raises(StepError, match="^a step could not be computed, for the requests r0, r1$") as caught:
        engine.step()
    assert caught.value.request_ids == ("r0", "r1")
    assert isinstance(caught.value.__cause__, MemoryError)
