"""llama.engine.sampler against transformers' logits processors, vLLM's formulas, and inverting in numpy.

The number that decides a draw is replaced by an even grid where a whole distribution is compared: each token
must then be drawn as often as its probability says, to a single row.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.engine import sampler
from llama.engine.sampler import SampleRow, adjust, sample
from tests.engine.processors import expected_adjustment, kept_distribution
from tests.engine.simulation import params

GRID = 2000


def random_logits(rows, vocab, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def drawn(logits, rows):
    """The ids of many rows of one and the same logits."""
    return [draw.token_id for draw in sample(logits.expand(len(rows), -1), rows)]


def on_a_grid(monkeypatch, logits, wanted, count=GRID):
    """The ids drawn as the deciding number goes from 0 to 1: its `position` is its place on the grid."""
    monkeypatch.setattr(sampler, "uniform", lambda seed, index, position: (position + 0.5) / count)
    return drawn(logits, [SampleRow(wanted, 0, 0, place) for place in range(count)])


# ---- which tokens, how likely ------------------------------------------------------------------------------


@settings(max_examples=60)
@given(seed=st.integers(0, 99), temperature=st.floats(0.2, 2),
       top_k=st.sampled_from([-1, 1, 2, 7, 40, 97, 500]),
       top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.1, 1e-6]),
       min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]))
def test_the_distribution_is_what_transformers_leaves(seed, temperature, top_k, top_p, min_p):
    wanted = params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = random_logits(1, 97, seed)[0]
    with pytest.MonkeyPatch.context() as monkeypatch:
        counts = np.bincount(on_a_grid(monkeypatch, logits, wanted), minlength=97)
    expected = kept_distribution(logits, wanted) * GRID
    assert counts[expected == 0].sum() == 0, "a token was drawn that is not kept"
    assert np.abs(counts - expected).max() < 1.01


@pytest.mark.parametrize("chosen", [
    {"top_p": 0.9}, {"top_p": 0.2}, {"min_p": 0.01}, {"top_k": 1023}, {"top_k": 1024}, {"top_k": 1025},
    {"top_k": 2000}, {"top_k": 2000, "top_p": 0.9}, {"top_k": 1024, "top_p": 0.9},
    {"top_k": 2999, "min_p": 0.5}, {"top_k": 2500, "top_p": 0.4}, {"top_p": 1 - 1e-9}, {"min_p": 1e-9},
], ids=str)
def test_rows_flatter_than_the_candidates_are_sorted_whole(monkeypatch, chosen):
    wanted = params(temperature=1.0, **chosen)
    logits = random_logits(1, 3000, scale=0.3)[0]
    probabilities = kept_distribution(logits, wanted)
    order = np.argsort(-probabilities, kind="stable")
    places = np.searchsorted(np.cumsum(probabilities[order]), (np.arange(400) + 0.5) / 400, side="right")
    found = on_a_grid(monkeypatch, logits, wanted, 400)
    kept = np.flatnonzero(probabilities)
    assert set(found) <= set(kept)
    # To a place: float32 probabilities differ from float64 ones by less than half of a token's share.
    ranks = np.argsort(order)[found]
    assert np.abs(ranks - places).max() <= 1


@pytest.mark.parametrize("chosen", [{}, {"top_k": 40}, {"top_p": 0.8}, {"min_p": 0.05}], ids=str)
@pytest.mark.parametrize("varied", ["seed", "index", "position"])
def test_draws_are_distributed_as_they_should_be(chosen, varied):
    """Chi-square over seeds, over samples and over positions, five standard deviations wide."""
    wanted = params(temperature=1.0, **chosen)
    logits = random_logits(1, 60, scale=1.5)[0]
    fixed = {"seed": 3, "index": 0, "position": 17}
    rows = [SampleRow(wanted, **{**fixed, varied: place}) for place in range(GRID)]
    expected = kept_distribution(logits, wanted) * GRID
    assert_chi_square(np.bincount(drawn(logits, rows), minlength=60), expected)


def assert_chi_square(counts, expected):
    """Cells that expect less than five draws are counted as one."""
    assert counts[expected == 0].sum() == 0
    small = expected < 5
    counts, expected = ([*values[~small], values[small].sum()] for values in (counts, expected))
    cells = [(count, mean) for count, mean in zip(counts, expected) if mean > 0]
    freedom = len(cells) - 1
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    assert freedom > 3 and abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_draws_one_after_another_do_not_depend_on_each_other():
    wanted = params(temperature=1.0)
    logits = torch.zeros(8)
    ids = np.array(drawn(logits, [SampleRow(wanted, 5, 0, position) for position in range(4 * GRID)]))
    assert_chi_square(np.bincount(ids[:-1] * 8 + ids[1:], minlength=64), np.full(64, (4 * GRID - 1) / 64))


# ---- extremes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("chosen", [{}, {"top_p": 0.9}, {"top_k": 5}], ids=str)
@pytest.mark.parametrize("scale", [3.0, 1e9])
def test_the_lower_the_temperature_the_greedier(temperature, chosen, scale):
    wanted = params(temperature=temperature, **chosen)
    logits = random_logits(1, 3000, scale=scale)[0]
    rows = [SampleRow(wanted, seed, 0, 0) for seed in range(8)]
    assert set(drawn(logits, rows)) == {int(logits.argmax())}


@pytest.mark.parametrize("top_k", [2**31, 2**63, 10**40])
@pytest.mark.parametrize("vocab", [50, 3000])
def test_a_top_k_beyond_all_integers_keeps_all(monkeypatch, top_k, vocab):
    logits = random_logits(1, vocab)[0]
    every, none = params(temperature=1.0, top_k=top_k), params(temperature=1.0, top_p=1 - 1e-12)
    assert on_a_grid(monkeypatch, logits, every, 50) == on_a_grid(monkeypatch, logits, none, 50)


def test_a_nucleus_smaller_than_any_token_keeps_the_likeliest():
    wanted = params(temperature=2.0, top_p=1e-9)
    logits = random_logits(1, 97, scale=0.1)[0]
    assert set(drawn(logits, [SampleRow(wanted, s, 0, 0) for s in range(20)])) == {int(logits.argmax())}


@pytest.mark.parametrize("chosen", [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 1}], ids=str)
def test_of_equals_greedy_takes_the_lowest_id(chosen):
    logits = torch.zeros(3, 128256)
    logits[0, [70000, 500, 128000]] = 9
    logits[1, [128255, 128254]] = 9
    rows = [SampleRow(params(**chosen), 0, 0, 0)] * 3
    ids = [draw.token_id for draw in sample(logits, rows)]
    if chosen["temperature"] == 0:
        assert ids == [500, 128254, 0]
    else:
        assert logits.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist() == [9, 9, 0]


def test_ties_are_drawn_evenly(monkeypatch):
    wanted = params(temperature=1.0, top_p=0.999)
    logits = torch.full((97,), -50.0)
    logits[[3, 50, 96]] = 2.0
    assert np.bincount(on_a_grid(monkeypatch, logits, wanted, 300))[[3, 50, 96]].tolist() == [100, 100, 100]


# ---- penalties, biases, bans -------------------------------------------------------------------------------


token_ids = st.integers(0, 29)
penalised_rows = st.builds(
    SampleRow,
    st.builds(params, temperature=st.sampled_from([0.0, 0.7]),
              frequency_penalty=st.sampled_from([0.0, 0.5, -2.0]),
              presence_penalty=st.sampled_from([0.0, 1.5, -1]),
              repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
              logit_bias=st.dictionaries(token_ids, st.sampled_from([-100, 100, 1.5, 2]), max_size=3),
              top_p=st.sampled_from([1.0, 0.8]), logprobs=st.sampled_from([None, 0, 3])),
    seed=st.integers(0, 2**64 - 1), index=st.integers(0, 15), position=st.integers(0, 200_000),
    prompt_ids=st.lists(token_ids, max_size=8),
    counts=st.dictionaries(token_ids, st.integers(1, 4), max_size=5),
    banned=st.lists(token_ids, max_size=3))


@settings(max_examples=100)
@given(st.lists(penalised_rows, min_size=1, max_size=6), st.integers(0, 9))
def test_penalties_biases_and_bans(rows, seed):
    logits = random_logits(len(rows), 30, seed)
    before = logits.clone()
    expected = torch.stack([expected_adjustment(line, row) for line, row in zip(logits, rows)])
    torch.testing.assert_close(adjust(logits, rows), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(logits, before)


@settings(max_examples=100)
@given(st.lists(penalised_rows, min_size=2, max_size=8), st.integers(0, 9))
def test_a_row_draws_the_same_in_any_company(rows, seed):
    logits = random_logits(len(rows), 30, seed)
    before = logits.clone()
    together = sample(logits, rows)
    assert together == [sample(logits[place:place + 1], [row])[0] for place, row in enumerate(rows)]
    assert together == sample(logits.flip(0), rows[::-1])[::-1]
    assert torch.equal(logits, before), "the logits were changed"


def test_nothing_to_adjust_is_no_copy():
    logits = random_logits(2, 30)
    assert adjust(logits, [SampleRow(params(), 0, 0, 0, counts={3: 1}, prompt_ids=[1])] * 2) is logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_of_a_hundred_decides(temperature):
    logits = random_logits(1, 30)[0]
    likeliest = int(logits.argmax())
    for bias, allowed in (({7: 100}, {7}), ({likeliest: -100}, set(range(30)) - {likeliest})):
        wanted = params(temperature=temperature, logit_bias=bias)
        assert set(drawn(logits, [SampleRow(wanted, s, 0, 0) for s in range(200)])) <= allowed


@pytest.mark.parametrize("chosen", [
    {"temperature": 0.0}, {"temperature": 2.0}, {"temperature": 2.0, "top_p": 0.99}], ids=str)
def test_what_is_banned_is_never_drawn_whatever_its_bias(chosen):
    wanted = params(**chosen, logit_bias={3: 100})
    ids = drawn(torch.zeros(6), [SampleRow(wanted, s, 0, 0, banned=(3, 5, 0)) for s in range(300)])
    assert set(ids) == ({1} if wanted.temperature == 0 else {1, 2, 4})
