"""What a step is: the batch of whole sequences, a segment's end, and where a block table's positions lie."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama.model.ragged import RaggedBatch, Segment, block_slots, slot_runs
from tests.model.pairs import runs_of


def test_one_whole_sequence():
    batch = RaggedBatch.whole(torch.tensor([7, 8, 9]))
    assert batch.ids.tolist() == [7, 8, 9] and batch.positions.tolist() == [0, 1, 2]
    assert batch.segments == (Segment(0, 3),)
    assert batch.slots is None and batch.logit_rows is None


def test_whole_sequences_of_one_length_lie_one_after_another():
    batch = RaggedBatch.whole(torch.tensor([[7, 8, 9], [4, 5, 6]]))
    assert batch.ids.tolist() == [7, 8, 9, 4, 5, 6] and batch.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.segments == (Segment(0, 3), Segment(0, 3))


def test_a_segment_ends_where_its_context_does():
    assert Segment(start=5, length=3).end == 8


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8, unique=True), st.integers(1, 5), st.data())
def test_slots_and_runs_of_a_block_table(table, block_size, data):
    end = data.draw(st.integers((len(table) - 1) * block_size + 1, len(table) * block_size), "end")
    start = data.draw(st.integers(0, end), "start")
    expected = [block * block_size + offset for block in table for offset in range(block_size)]
    assert block_slots(np.array(table), start, end, block_size).tolist() == expected[start:end]
    assert slot_runs(np.array(table), end, block_size) == runs_of(expected[:end])
