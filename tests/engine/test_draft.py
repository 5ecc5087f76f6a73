"""llama.engine.draft: what a draft model guesses, against its greedy continuation, and its blocks."""

import pytest
import torch

from llama.engine.draft import DraftModel
from llama.engine.request import Request
from llama.engine.sequence import Sequence
from tests.engine.running import TINY
from tests.engine.simulation import params
from tests.model.pairs import hugging_face, ours, random_ids


@pytest.fixture(scope="module")
def oracle():
    """transformers' model."""
    return hugging_face(TINY["8:2"])


@pytest.fixture
def draft(oracle):
    """Guesses by the same weights; slots hold NaN until they are written."""
    made = DraftModel(ours(oracle), num_blocks=12, block_size=4, max_draft=5)
    made.cache.keys.fill_(torch.nan)
    made.cache.values.fill_(torch.nan)
    return made


def sequence(ids):
    return Sequence(Request("r", tuple(ids), params()), seed=0, root=b"")


def greedy(oracle, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(oracle(torch.tensor([ids])).logits[0, -1].argmax()))
    return tuple(ids[-count:])


def test_guesses_are_the_likeliest_tokens_whatever_became_of_the_ones_before(oracle, draft):
    text = sequence(random_ids(9))
    for num_right, others in ((0, []), (5, [3]), (0, [7]), (2, [8]), (0, [8, 9, 10]), (5, [])):
        guesses = draft.propose(text, 5)
        assert guesses == greedy(oracle, text.ids, 5)
        for token_id in (*guesses[:num_right], *others):
            text.append(token_id)
    draft.pool.check([one.table for one in draft._progress.values()])


def test_as_many_as_are_allowed_and_as_pay(draft):
    text = sequence(random_ids(9))
    assert len(draft.propose(text, 2)) == 2
    text.draft_success = 0.4
    assert len(draft.propose(text, 5)) == 2
    text.draft_success = 0.0
    assert len(draft.propose(text, 5)) == 1


def test_where_there_is_no_room_there_is_no_guess(draft):
    first, second = sequence(random_ids(30)), sequence(random_ids(20))
    assert draft.propose(first, 5) and draft.propose(second, 5) == ()
    draft.forget(second)
    draft.forget(first)
    assert draft.propose(second, 5)
    draft.forget(second)
    draft.forget(second)
    assert draft.pool.num_held == 0
    assert draft.propose(sequence(random_ids(510)), 5) == ()
