"""The engine on a GPU: captured steps and steps that run ahead change no token; deterministic mode changes no bit."""

from collections import Counter

import pytest
import torch

from llama.engine.engine import BLOCK_SIZE
from llama.engine.limits import Limits
from llama.engine.propose import PromptLookup
from llama.engine.request import SamplingParams
from tests.engine.running import alone, engine_of, run
from tests.engine.simulation import request
from tests.gpu.loaded import QUESTIONS, conversation, demo

GREEDY = SamplingParams(temperature=0.0, max_tokens=14)
CHOSEN = ({}, {"temperature": 0.8, "n": 2}, {"prompt_logprobs": 1}, {"temperature": 1.0, "top_p": 0.9},
          {"repetition_penalty": 1.2}, {"temperature": 1.0, "frequency_penalty": 0.5, "min_tokens": 5})


def asked_of(llm):
    return [request(f"r{place}", conversation(llm, text), seed=place, logprobs=2, max_tokens=14, ignore_eos=True, **chosen)
            for place, (text, chosen) in enumerate(zip(QUESTIONS, CHOSEN))]


@pytest.fixture
def plain_device():
    """A GPU for an engine that is to capture nothing and to run nothing ahead."""
    from llama.engine.device import CudaDevice

    found = CudaDevice()
    found.captures = False
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_greedy_texts_are_those_of_the_cpu(device, dtype):
    for text in QUESTIONS:
        said = [demo(where, kind).chat([{"role": "user", "content": text}], GREEDY, date_string="26 Jul 2024").text
                for where, kind in ((device, dtype), ("cpu", "float32"))]
        assert said[0] == said[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphs_and_running_ahead_change_no_token(device, dtype, plain_device):
    model, asked = demo(device, dtype).model, asked_of(demo(device, dtype))
    limits = Limits(512, step_tokens=64, mixed_step_tokens=32)
    captured = run(engine_of(model, limits, 400), asked, every=2)
    plain = run(engine_of(model, limits, 400, device=plain_device), asked, every=2)
    assert captured.ids == plain.ids and captured.reasons == plain.reasons
    assert captured.values() == pytest.approx(plain.values(), abs=1e-3 if dtype == "float32" else 0.1)


def test_any_number_of_sequences_finds_a_graph_that_fits(device):
    """Batches of every size up to eleven: some fill a captured step, others are filled up."""
    llm = demo(device)
    for count in range(1, 12):
        asked = [request(f"r{place}", conversation(llm, QUESTIONS[place % 6])[place % 3:], seed=place, logprobs=0, max_tokens=6,
                         temperature=0.0, ignore_eos=True) for place in range(count)]
        found = run(engine_of(llm.model, Limits(512), 400, prefix_sharing=False), asked)
        assert found.ids == alone(llm.model, asked).ids


def test_sequences_that_come_and_go_do_not_disturb_the_others(device):
    llm = demo(device)
    asked = asked_of(llm)
    engine = engine_of(llm.model, Limits(512), 400)
    found = run(engine, asked, every=3, cancel={"r0": 5, "r3": 13})
    expected = alone(llm.model, asked).ids
    assert all(expected[key] == ids for key, ids in found.ids.items() if key[0] not in ("r0", "r3"))
    assert all(expected[key][:len(ids)] == ids for key, ids in found.ids.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_mode_gives_the_same_bits_alone_in_company_chunked_preempted_and_guessed(device, dtype):
    llm = demo(device, dtype, deterministic=True)
    asked = asked_of(llm)
    plain = alone(llm.model, asked)
    tight = -(-max(len(one.prompt_ids) for one in asked) // BLOCK_SIZE) + 2
    small, lookup = Limits(512, step_tokens=23, mixed_step_tokens=11), PromptLookup(min_ngram=1)
    counts = Counter()
    for limits, num_blocks, proposer, times in ((Limits(512), 400, None, 2), (small, 400, lookup, 1), (small, tight, None, 1)):
        engine = engine_of(llm.model, limits, num_blocks, proposer=proposer)
        for _ in range(times):  # the second time, prefixes are found
            found = run(engine, asked)
            assert found.samples == plain.samples and found.prompts == plain.prompts
            counts += found.counts
    assert min(counts[what] for what in ("cached", "preempted", "accepted")) > 1, counts


@pytest.mark.parametrize("kept", ["int8", "fp8"])
def test_a_rounded_cache_says_the_same_on_the_demo(device, kept):
    rounded = demo(device, "bfloat16", kv_cache_dtype=kept)
    for text in QUESTIONS[:3]:
        ids = conversation(rounded, text)
        assert rounded.generate(ids, GREEDY).text == demo(device, "bfloat16").generate(ids, GREEDY).text


def test_a_draw_with_a_seed_is_that_of_the_cpu(device):
    """Float32 logits differ by less than the distances between a draw and the next id's share, but for rare chances."""
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=5, max_tokens=12)
    said = [demo(where).generate(conversation(demo(where), QUESTIONS[4]), params).ids for where in (device, "cpu")]
    assert said[0] == said[1]


def test_a_failed_step_can_be_tried_again(device, monkeypatch):
    llm = demo(device)
    engine = engine_of(llm.model, Limits(512), 100)
    [one] = [request("r", conversation(llm, QUESTIONS[0]), logprobs=0, max_tokens=6, temperature=0.0, ignore_eos=True)]
    expected = alone(llm.model, [one]).ids
    calls = iter([True])
    hidden = type(llm.model).hidden

    def failing(*arguments):
        if next(calls, False):
            raise torch.cuda.OutOfMemoryError("planted")
        return hidden(*arguments)

    monkeypatch.setattr(type(llm.model), "hidden", failing)
    engine.submit(one)
    with pytest.raises(Exception, match="r"):
        engine.step()
    ids = []
    while engine.has_work:
        ids += [event.token_id for event in engine.step() if getattr(event, "token_id", None) is not None]
    assert ids == expected["r", 0]
