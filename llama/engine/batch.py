"""A plan as tensors: the ragged batch that the model computes, and which of its rows are sampled."""

from collections.abc import Sequence as Ordered

import numpy as np
import torch

from llama.engine.step import Scheduled
from llama.model.ragged import RaggedBatch, Segment, block_slots, slot_runs


def ragged_batch(scheduled: Ordered[Scheduled], block_size: int, device: torch.device) -> RaggedBatch:
    """Lay the scheduled tokens one after another, with the cache slots that they write and read."""
    ids, positions, slots, segments = [], [], [], []
    for item in scheduled:
        end = item.start + item.length
        table = np.asarray(item.sequence.table[:-(-end // block_size)])
        ids += item.ids
        positions.append(np.arange(item.start, end))
        slots.append(block_slots(table, item.start, end, block_size))
        segments.append(Segment(item.start, item.length, slot_runs(table, end, block_size)))
    return RaggedBatch(
        ids=torch.tensor(ids, device=device),
        positions=torch.from_numpy(np.concatenate(positions)).to(device),
        segments=tuple(segments),
        slots=torch.from_numpy(np.concatenate(slots)).to(device),
        logit_rows=torch.tensor(_logit_rows(scheduled), dtype=torch.int64, device=device),
    )


def _logit_rows(scheduled: Ordered[Scheduled]) -> list[int]:
    """The tokens after which one is drawn: each sequence's last known one and the guesses that follow it."""
    rows, first = [], 0
    for item in scheduled:
        last = first + item.length
        if item.samples:
            rows += range(last - 1 - len(item.draft), last)
        first = last
    return rows
