"""llama.engine.batch: a plan laid out as tensors, against the definition of a slot."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from llama.engine.batch import ragged_batch
from llama.engine.request import Request
from llama.engine.step import Scheduled
from llama.engine.sequence import Sequence
from tests.engine.simulation import params

SIZE = 4


def scheduled(ids, table, start, length, draft=()):
    sequence = Sequence(Request("r", tuple(ids), params()), seed=0, root=b"", table=list(table))
    return Scheduled(sequence, start, length, tuple(draft))


def slot(table, position):
    return table[position // SIZE] * SIZE + position % SIZE


@st.composite
def items(draw):
    """A sequence somewhere in its life: in its prompt, at its end, or with guesses after it."""
    known = draw(st.integers(1, 20))
    start = draw(st.integers(0, known - 1))
    length = draw(st.integers(1, known - start))
    draft = draw(st.lists(st.integers(0, 9), max_size=5)) if start + length == known else []
    needed = -(-(start + length + len(draft)) // SIZE)
    table = draw(st.permutations(range(12)))[:needed + draw(st.integers(0, 2))]
    return scheduled(range(100, 100 + known), table, start, length + len(draft), draft)


@given(st.lists(items(), min_size=1, max_size=5))
def test_every_token_has_its_position_its_slot_and_its_past(plan):
    batch = ragged_batch(plan, SIZE, torch.device("cpu"))
    ids, positions, slots, rows = [], [], [], []
    for item in plan:
        here = range(item.start, item.start + item.length)
        known = [*item.sequence.ids, *item.draft]
        for position in here:
            if position >= len(item.sequence.ids) - 1 and item.samples:
                rows.append(len(ids))
            ids.append(known[position])
            positions.append(position)
            slots.append(slot(item.sequence.table, position))
    assert batch.ids.tolist() == ids and batch.positions.tolist() == positions
    assert batch.slots.tolist() == slots and batch.logit_rows.tolist() == rows
    for item, segment in zip(plan, batch.segments, strict=True):
        assert (segment.start, segment.length) == (item.start, item.length)
        past = [slot(item.sequence.table, position) for position in range(segment.end)]
        assert [place for first, last in segment.runs for place in range(first, last)] == past


def test_neighbouring_blocks_are_one_run():
    [segment] = ragged_batch([scheduled(range(10), [5, 6, 7], 0, 10)], SIZE, torch.device("cpu")).segments
    assert segment.runs == ((20, 30),)
    [segment] = ragged_batch([scheduled(range(10), [5, 7, 8], 0, 10)], SIZE, torch.device("cpu")).segments
    assert segment.runs == ((20, 24), (28, 34))


def test_a_chunk_that_ends_before_the_prompt_does_asks_for_no_logits():
    batch = ragged_batch([scheduled(range(10), [0, 1, 2], 0, 9)], SIZE, torch.device("cpu"))
    assert batch.logit_rows.tolist() == []
