"""A plan as tensors: the ragged batch that the model computes, and which of its rows are sampled."""

from collections.abc import Sequence as Ordered

import numpy as np
import torch

from llama.engine.scheduler import Scheduled
from llama.model.ragged import RaggedBatch, Segment


def ragged_batch(scheduled: Ordered[Scheduled], block_size: int, device: torch.device) -> RaggedBatch:
    """Lay the scheduled tokens one after another, with the cache slots that they write and read."""
    ids, positions, slots, segments = [], [], [], []
    for item in scheduled:
        table = np.asarray(item.sequence.table[:-(-(item.start + item.length) // block_size)], dtype=np.int64)
        where = np.arange(item.start, item.start + item.length)
        ids += item.ids
        positions.append(where)
        slots.append(table[where // block_size] * block_size + where % block_size)
        segments.append(Segment(item.start, item.length, _runs(table, item.start + item.length, block_size)))
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


def _runs(table: np.ndarray, length: int, block_size: int) -> tuple[tuple[int, int], ...]:
    """The slots of the first `length` positions, with blocks that lie side by side joined."""
    breaks = np.flatnonzero(np.diff(table) != 1) + 1
    runs = []
    for group in np.split(table, breaks):
        first, count = int(group[0]) * block_size, min(len(group) * block_size, length)
        runs.append((first, first + count))
        length -= count
    return tuple(runs)
