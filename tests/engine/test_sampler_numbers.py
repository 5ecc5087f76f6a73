"""llama.engine.sampler: the number that decides a draw, and log probabilities."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from llama.engine.request import TokenLogprob
from llama.engine.sampler import SampleRow, log_probabilities, sample, uniform
from tests.engine.simulation import params
from tests.engine.test_sampler import random_logits

MASK = 2**64 - 1


def philox(counter, key):
    """Philox4x64-10 as Salmon, Moraes, Dror and Shaw define it: the first 64-bit word."""
    words, (low, high) = [counter >> shift & MASK for shift in (0, 64, 128, 192)], key
    for _ in range(10):
        left, right = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [(right >> 64) ^ words[1] ^ low, right & MASK, (left >> 64) ^ words[3] ^ high, left & MASK]
        low, high = (low + 0x9E3779B97F4A7C15) & MASK, (high + 0xBB67AE8584CAA73B) & MASK
    return words[0]


@given(st.integers(0, MASK), st.integers(0, 15), st.integers(0, 2**31))
@example(0, 0, 0)
@example(MASK, 15, 131_071)
@example(2**63, 0, 1)
def test_the_deciding_number_is_philox(seed, index, position):
    number = uniform(seed, index, position)
    assert number == (philox(position + 1, (seed, index)) >> 11) / 2**53
    key = np.array([seed, index], dtype=np.uint64)
    assert number == np.random.Generator(np.random.Philox(key=key, counter=position)).random()
    assert 0 <= number < 1


def test_no_two_seeds_samples_or_positions_share_a_number():
    """High seeds too, which are what negative ones become."""
    seeds = [*range(20), *range(2**63 - 10, 2**63 + 10), *range(2**64 - 20, 2**64)]
    keys = [(seed, index, position) for seed in seeds for index in range(3) for position in range(5)]
    assert len({uniform(*key) for key in keys}) == len(keys)


def test_log_probabilities_are_those_of_the_raw_logits():
    logits = random_logits(4, 200)
    expected = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    chosen = [{}, {"temperature": 0.3, "top_k": 2}, {"logit_bias": {7: 100}}, {"repetition_penalty": 2.0}]
    rows = [SampleRow(params(logprobs=5, **one), 1, 0, 0, prompt_ids=range(200)) for one in chosen]
    for line, draw in zip(expected, sample(logits, rows)):
        assert draw.logprob == pytest.approx(line[draw.token_id].item(), abs=1e-5)
        best = line.sort(descending=True)
        assert [token_id for token_id, _ in draw.top] == best.indices[:5].tolist()
        assert [value for _, value in draw.top] == pytest.approx(best.values[:5].tolist(), abs=1e-5)
    assert sample(logits, rows)[2].token_id == 7


def test_each_row_gets_as_many_alternatives_as_it_wants():
    logits = random_logits(5, 12)
    results = log_probabilities(logits, [1, 2, 3, 4, 5], [None, 0, 3, 20, None])
    assert [len(result.top) for result in results] == [0, 0, 3, 12, 0]
    assert results[0] == TokenLogprob(1, None) and results[4] == TokenLogprob(5, None)
    assert [result.token_id for result in results] == [1, 2, 3, 4, 5]
    logprobs = torch.log_softmax(logits, -1)
    assert [result.logprob for result in results[1:4]] == pytest.approx(
        [logprobs[row, row + 1].item() for row in (1, 2, 3)])


def test_which_of_equals_are_alternatives_does_not_hang_on_what_others_want():
    logits = random_logits(40, 200).round()
    wanted = [(0, 2, 3, 20, None)[row % 5] for row in range(40)]
    together = log_probabilities(logits, [7] * 40, wanted)
    assert together == [log_probabilities(logits[row:row + 1], [7], wanted[row:row + 1])[0] for row in range(40)]


def test_no_more_alternatives_are_sought_than_a_row_wants():
    class Sought(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.Tensor.topk:
                shapes.append(tuple(result.values.shape))
            return result

    shapes = []
    with Sought():
        log_probabilities(random_logits(6, 50), [1] * 6, [0, None, 3, 0, 5, 0])
    assert sorted(shapes) == [(1, 3), (1, 5), (3, 0)]


def test_log_probabilities_survive_extreme_logits():
    logits = torch.tensor([[3e4, -3e4, 0.0], [-torch.inf, 0.0, 0.0]])
    certain, even = log_probabilities(logits, [0, 1], [1, 1])
    assert certain.logprob == 0 and even.logprob == pytest.approx(-np.log(2))
