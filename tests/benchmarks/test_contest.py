"""Contestants: what they compute is one model's, they take turns with the same prompts, and a lost one is reported."""

import math

import pytest
import torch

from benchmarks.compare import agreement
from benchmarks.contest import Entry, Outcome, contest, random_prompt
from benchmarks.contestants import Distant, Ours, Transformers, Turn
from benchmarks.memory import forget, read, start
from benchmarks.prefill import allowed, operations
from benchmarks.weights import Source
from llama.config import LlamaConfig
from tools.make_checkpoint import main as make_checkpoint
from tools.make_checkpoint import make_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoint")
    make_checkpoint([str(directory), "--shape", "tiny", "--dtype", "float32"])
    return directory


@pytest.mark.parametrize("resident", [True, False], ids=["together", "one at a time"])
def test_ours_and_transformers_generate_the_same(checkpoint, monkeypatch, resident):
    monkeypatch.setattr("benchmarks.contest.available_memory", lambda: 1 << 30 if resident else 0)
    entries = {"theirs": Entry(Transformers, (Source(checkpoint), 40), 1),
               "ours": Entry(Ours, (Source(checkpoint), {}, 40), 1)}
    outcomes = contest(entries, 20, 6, 2 if resident else 1, 512, num_threads=1)
    theirs, ours = outcomes["theirs"], outcomes["ours"]
    assert [len(turn.ids) for turn in ours.turns] == [7] * len(ours.turns)
    assert [turn.ids for turn in ours.turns] == [turn.ids for turn in theirs.turns]
    assert abs(ours.logits - theirs.logits).max() < 1e-4
    assert ours.facts["weight_bytes"] == ours.facts["step_bytes"] + 512 * 64 * 4
    found = agreement(outcomes)["ours"]
    assert found["kl"] < 1e-8 and found["same_tokens"] == 7
    assert all(turn.prefill > 0 and turn.decode > 0 for turn in ours.turns)


def test_rates_and_agreement_by_hand():
    first = Outcome([Turn(2.0, 4.0, [1, 2, 3])], {}, torch.tensor([0.0, 0.0]).numpy())
    other = Outcome([Turn(2.0, 4.0, [1, 2, 5])], {}, torch.tensor([0.0, math.log(3)]).numpy())
    assert first.rates(10, 2) == {"prefill": [5.0], "decode": [0.5]}
    found = agreement({"one": first, "two": other})["two"]
    assert found == {"kl": pytest.approx(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)), "same_tokens": 2}


def test_what_goes_wrong_in_a_contestant_is_told(checkpoint):
    with pytest.raises(RuntimeError, match="Ours: .*/none does not exist; name the directory of a checkpoint"):
        Distant(Ours, (Source(checkpoint / "none"), {}, 8), 1)
    contestant = Distant(Ours, (Source(checkpoint), {}, 8), 1)
    with pytest.raises(RuntimeError, match="Ours: .*prompt"):
        contestant.ask("turn", [600], 1)
    contestant.close()


def test_prompts_repeat_nothing_and_are_the_same_for_all():
    assert random_prompt(50, 512, 3) == random_prompt(50, 512, 3) != random_prompt(50, 512, 4)
    assert max(random_prompt(1000, 512, 3)) < 256


def test_operations_of_a_prompt():
    """The 1B shape has 0.97 billion weights in its layers."""
    config = LlamaConfig.from_dict(make_config("1b", {}))
    matrices = 16 * 2048 * (2048 * 2 + 512 * 2 + 3 * 8192) + 128256 * 2048 / 512
    attention = 16 * 32 * 64 * 4 * 512 / 2
    assert operations(config, 512) == pytest.approx(512 * (2 * matrices + attention), rel=0.003)


def test_operations_of_a_prompt_by_hand():
    """One layer, two heads of 2: every matrix has 8 · 8 or 4 · 8 weights, and three tokens make 6 pairs."""
    config = LlamaConfig.from_dict(make_config("tiny", {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 16, "vocab_size": 10}))
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    norms = 3 * 8  # counted as weights too: nothing beside the others
    attention = 2 * 2 * 8 * (1 + 2 + 3)  # scores and sums, 8 numbers for each pair
    assert operations(config, 3) == 2 * (3 * (layer + norms) + 8 * 10) + attention


def test_what_products_a_format_may_use():
    on_cpu, on_gpu = {"float32": 1.0, "bfloat16": 2.0, "int8 × int8": 5.0}, {"bfloat16": 2.0, "fp8 × fp8": 4.0}
    assert [allowed(name, on_cpu, "cpu") for name in ("float32", "bf16", "int8")] == [2, 2, 5]
    assert [allowed(name, on_gpu, "cuda") for name in ("bf16", "int8", "int4", "fp8")] == [2, 2, 2, 4]


def test_a_start_is_measured_in_a_process_of_its_own(checkpoint):
    files = list(checkpoint.glob("*.safetensors"))
    forget(files)
    assert read(files) > 0
    found = start(checkpoint, "float32", 4, num_threads=1)
    rotary = 16 // 2  # frequencies, which are no weights
    assert found["weights"] == 4 * (LlamaConfig.from_directory(checkpoint).num_parameters + rotary)
    assert 0 < found["imports"] < found["total"] and found["peak"] > found["weights"]
    assert found["total"] == pytest.approx(found["imports"] + found["loading"] + found["first"])
