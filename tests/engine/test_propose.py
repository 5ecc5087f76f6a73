"""llama.engine.propose against a search by slices, and the giving up where guesses fail."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.engine.propose import LONGEST_NGRAM, PromptLookup
from llama.engine.request import Request
from llama.engine.sequence import Sequence
from tests.engine.simulation import params

ids_of_few_kinds = st.lists(st.integers(0, 2), min_size=1, max_size=60)


def sequence(ids, draft_success=1.0):
    return Sequence(Request("r", tuple(ids), params()), seed=0, root=b"", draft_success=draft_success)


def guesses_by_slices(ids, min_ngram, most):
    """What followed the latest earlier occurrence of the longest suffix that has one."""
    for length in range(min(len(ids) - 1, LONGEST_NGRAM), min_ngram - 1, -1):
        for first in range(len(ids) - length - 1, -1, -1):
            if ids[first:first + length] == ids[-length:]:
                return tuple(ids[first + length:first + length + most])
    return ()


@given(ids_of_few_kinds, st.integers(1, 4), st.integers(1, 8))
def test_guesses_are_what_followed_the_longest_match(ids, min_ngram, most):
    found = PromptLookup(min_ngram, max_draft=8).propose(sequence(ids), most)
    assert found == guesses_by_slices(ids, min_ngram, most)


def test_a_longer_match_wins_over_a_later_one():
    ids = [7, 1, 2, 3, 50, 9, 2, 3, 60, 7, 1, 2, 3]
    assert PromptLookup(min_ngram=2, max_draft=1).propose(sequence(ids), 1) == (50,)


def test_the_latest_of_equal_matches_wins():
    ids = [1, 2, 3, 50, 1, 2, 3, 60, 1, 2, 3]
    assert PromptLookup(min_ngram=3, max_draft=1).propose(sequence(ids), 1) == (60,)


def test_nothing_is_guessed_where_nothing_is_repeated():
    assert PromptLookup(min_ngram=1).propose(sequence(range(40)), 8) == ()
    assert PromptLookup(min_ngram=3).propose(sequence([1, 2, 8, 9, 1, 2]), 8) == ()
    assert PromptLookup(min_ngram=3).propose(sequence([1, 2]), 8) == ()


def test_ids_of_64_bits_are_compared_whole():
    assert PromptLookup(min_ngram=1).propose(sequence([2**32 + 1, 5, 1]), 8) == ()


@pytest.mark.parametrize("draft_success, expected", [(1.0, 8), (0.5, 4), (0.21, 2)])
def test_drafts_shrink_with_their_success(draft_success, expected):
    text = sequence([*range(20), *range(5)], draft_success)
    assert len(PromptLookup(max_draft=8).propose(text, 8)) == expected
    assert len(PromptLookup(max_draft=8).propose(text, 1)) == 1


def test_a_sequence_that_cannot_be_guessed_is_left_alone_but_for_an_occasional_try():
    lookup = PromptLookup(give_up=0.2, retry_every=16)
    tries = [len(lookup.propose(sequence([1, 2, 3] * 40 + [1] * more, 0.1), 8)) for more in range(64)]
    assert sorted(set(tries)) == [0, 1] and sum(tries) == 4


def test_success_is_learned_and_unlearned():
    text = sequence([1])
    for _ in range(6):
        text.learn(8, 0)
    assert text.draft_success < 0.2
    for _ in range(2):
        text.learn(1, 1)
    assert text.draft_success > 0.4


def test_beyond_the_longest_ngram_the_latest_match_wins():
    """Text that repeats itself is not compared at every length: a step would cost the context's square."""
    end = list(range(LONGEST_NGRAM + 8))
    ids = [*end, 500, *end[4:], 600, *end]
    assert PromptLookup(max_draft=1).propose(sequence(ids), 1) == (600,)
    ids = [*end, 500, *end[-LONGEST_NGRAM + 1:], 600, *end]
    assert PromptLookup(max_draft=1).propose(sequence(ids), 1) == (500,)
