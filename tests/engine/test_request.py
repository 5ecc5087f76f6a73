"""llama.engine.request: what is refused, in which words; what defaults fill."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.engine.request import RequestError, SamplingParams

WRONG = [
    ("max_tokens", 0, "max_tokens must be an integer at least 1, not 0"),
    ("max_tokens", 1.0, "max_tokens must be an integer at least 1, not 1.0"),
    ("max_tokens", True, "max_tokens must be an integer at least 1, not True"),
    ("temperature", -0.1, "temperature must be a number from 0 to 2, not -0.1"),
    ("temperature", 2.1, "temperature must be a number from 0 to 2, not 2.1"),
    ("temperature", math.nan, "temperature must be a number from 0 to 2, not nan"),
    ("temperature", True, "temperature must be a number from 0 to 2, not True"),
    ("temperature", "1", "temperature must be a number from 0 to 2, not '1'"),
    ("top_p", 0, "top_p must be a number above 0 and at most 1, not 0"),
    ("top_p", 1.01, "top_p must be a number above 0 and at most 1, not 1.01"),
    ("top_k", 0, "top_k must be -1 (off) or at least 1, not 0"),
    ("top_k", -2, "top_k must be an integer at least -1, not -2"),
    ("min_p", -0.1, "min_p must be a number from 0 to 1, not -0.1"),
    ("frequency_penalty", 2.5, "frequency_penalty must be a number from -2 to 2, not 2.5"),
    ("presence_penalty", math.inf, "presence_penalty must be a number from -2 to 2, not inf"),
    ("repetition_penalty", 0, "repetition_penalty must be a number above 0 and at most 2, not 0"),
    ("seed", 2**64, f"seed must be an integer from {-2**63} to {2**64 - 1}, not {2**64}"),
    ("seed", 1.5, f"seed must be an integer from {-2**63} to {2**64 - 1}, not 1.5"),
    ("min_tokens", -1, "min_tokens must be an integer at least 0, not -1"),
    ("min_tokens", None, "min_tokens must be an integer at least 0, not None"),
    ("n", 0, "n must be an integer from 1 to 16, not 0"),
    ("n", 17, "n must be an integer from 1 to 16, not 17"),
    ("n", None, "n must be an integer from 1 to 16, not None"),
    ("logprobs", 21, "logprobs must be an integer from 0 to 20, not 21"),
    ("prompt_logprobs", -1, "prompt_logprobs must be an integer from 0 to 20, not -1"),
    ("stop", ("a", ""), "stop must be at most 16 strings, none of them empty"),
    ("stop", ("a",) * 17, "stop must be at most 16 strings, none of them empty"),
    ("stop", (1,), "stop must be at most 16 strings, none of them empty"),
    ("stop", 5, "stop must be a list, not 5"),
    ("stop_token_ids", 5, "stop_token_ids must be a list, not 5"),
    ("logit_bias", [1], "logit_bias must map token ids to numbers, not be [1]"),
    ("ignore_eos", 1, "ignore_eos must be True or False, not 1"),
    ("skip_special_tokens", None, "skip_special_tokens must be True or False, not None"),
    ("include_stop_str_in_output", "no", "include_stop_str_in_output must be True or False, not 'no'"),
    ("stop_token_ids", (-1,), "stop_token_ids must hold token ids, not -1"),
    ("stop_token_ids", (True,), "stop_token_ids must hold token ids, not True"),
    ("logit_bias", {-1: 1.0}, "logit_bias must map token ids, not -1"),
    ("logit_bias", {"1": 1.0}, "logit_bias must map token ids, not '1'"),
    ("logit_bias", {1: 100.5}, "logit_bias of 1 must be from -100 to 100, not 100.5"),
    ("logit_bias", {1: math.nan}, "logit_bias of 1 must be from -100 to 100, not nan"),
]


@pytest.mark.parametrize("name, value, message", WRONG)
def test_what_is_out_of_range_is_refused_by_name(name, value, message):
    with pytest.raises(RequestError) as refusal:
        SamplingParams(**{name: value})
    assert str(refusal.value) == message
    assert refusal.value.field == name


def test_min_tokens_may_not_exceed_max_tokens():
    with pytest.raises(RequestError, match="min_tokens 5 is more than max_tokens 4") as refusal:
        SamplingParams(max_tokens=4, min_tokens=5)
    assert refusal.value.field == "min_tokens"
    SamplingParams(max_tokens=4, min_tokens=4)


def test_the_ends_of_every_range_are_accepted():
    SamplingParams(max_tokens=1, temperature=0, top_p=1, top_k=-1, min_p=1, frequency_penalty=-2,
                   presence_penalty=2, repetition_penalty=2, logit_bias={0: -100, 1: 100}, seed=-2**63, n=16,
                   logprobs=20, prompt_logprobs=0, stop=("x",) * 16)
    SamplingParams(temperature=2, top_p=1e-9, top_k=1, seed=2**64 - 1, n=1)


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="END").stop == ("END",)
    lists, tuples = {"stop": ["a"], "stop_token_ids": [3]}, {"stop": ("a",), "stop_token_ids": (3,)}
    assert SamplingParams(**lists) == SamplingParams(**tuples)


@given(st.fixed_dictionaries({}, optional={
    "max_tokens": st.integers(1, 9), "temperature": st.floats(0, 2), "top_p": st.floats(0.1, 1),
    "top_k": st.sampled_from([-1, 1, 5]), "repetition_penalty": st.floats(0.1, 2)}))
def test_defaults_fill_what_is_open_and_nothing_else(chosen):
    defaults = SamplingParams(max_tokens=7, temperature=0.25, top_p=0.75, top_k=3, repetition_penalty=1.25,
                              n=4, seed=1, min_p=0.5, presence_penalty=1.0)
    filled = SamplingParams(n=2, **chosen).with_defaults(defaults)
    names = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
    assert filled == dataclasses.replace(SamplingParams(n=2), **{
        name: chosen.get(name, getattr(defaults, name)) for name in names})
