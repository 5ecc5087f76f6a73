"""The five experiments, each with the result that it is there to show."""

import subprocess
import sys

import pytest
import torch

from llama.runtime import Llama
from tools.tour import induction, lens, patching, rope, steering


@pytest.fixture(scope="module")
def llm() -> Llama:
    """The demo model, whose experiments these are."""
    return Llama.load(dtype="float32", progress=False)


def test_rope_turns_each_pair_by_its_frequency_and_attention_sees_distance_alone(llm):
    found = rope.experiment(llm)
    used = found["angles"].isfinite().all(dim=0)
    away = (found["angles"] - found["expected"])[:, used]
    assert used.sum() > 4 and (torch.polar(torch.ones_like(away), away).angle().abs() < 1e-4).all()
    assert found["expected"].abs().max() > 3  # it turns all the way round
    for back in range(24):
        diagonal = found["scores"].diagonal(-back)
        assert (diagonal - diagonal[0]).abs().max() < 1e-4
    assert found["scores"][23, [23, 22, 19]].std() > 0.01  # and distance matters


def test_induction_heads_are_found_and_nothing_repeats_without_them(llm):
    found = induction.experiment(llm)
    assert found.heads == [(1, 0), (1, 1)]
    assert found.loss < 0.7 * found.first_half
    assert found.without == pytest.approx(found.first_half, rel=0.05)
    assert found.without_others - found.loss < 0.1 * (found.without - found.loss)


def test_the_answer_to_a_sum_appears_in_the_last_layer(llm):
    found = lens.experiment(llm)
    assert "".join(found.reply) == "17 + 25 = 42.<|eot_id|>"
    digits = [len(found.reply) - 4, len(found.reply) - 3]
    assert [found.said[-1][place] for place in digits] == ["4", "2"]
    for layer in range(len(found.names) - 1):
        assert [found.said[layer][place] for place in digits] != ["4", "2"]
    assert all(found.probability[-1][place] > 0.9 for place in digits)
    assert found.probability[1][digits[0]] < 0.1
    shares = torch.cat([found.attribution.heads, found.attribution.mlps[:, None]], dim=1)
    assert shares.argmax() == 4 * 5 + 4  # the last layer's feed-forward


def test_a_name_is_at_its_own_tokens_first_and_then_where_it_is_said(llm):
    found = patching.experiment(llm)
    assert found.replies == ["Nice to meet you, Kim.", "Nice to meet you, Tom.", "Nice to meet you, Kim."]
    share, last = found.sweep.recovered, len(found.tokens) - 1
    assert share[0, found.name_at[0]] > 0.8 and abs(share[0, last]) < 0.1
    assert abs(share[4, found.name_at[0]]) < 0.1 and share[4, last] == pytest.approx(1, abs=1e-3)
    elsewhere = [place for place in range(last) if place not in (*found.name_at, *range(last - 5, last))]
    assert share[:, elsewhere].abs().max() < 0.1


def test_a_direction_turns_a_greeting_into_a_sum_and_back(llm):
    replies = steering.experiment(llm)
    assert replies["Hello"][0] == "Hello. How can I assist you today?" and " + " in replies["Hello"][1]
    assert replies["What is 17 + 25?"][0] == "17 + 25 = 42."
    assert replies["What is 17 + 25?"][-1] == "Hello. How can I assist you today?"


@pytest.mark.parametrize("name", ["rope", "steering"])
def test_an_experiment_is_a_command(name):
    ran = subprocess.run([sys.executable, "-m", f"tools.tour.{name}"], capture_output=True, text=True, check=True)
    assert ran.stdout.count("\n") > 8 and ran.stderr == ""
