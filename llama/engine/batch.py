"""A plan as tensors: the ragged batch that the model computes, and which of its rows are sampled."""

from collections.abc import Sequence as Ordered

import numpy as np
import torch

from llama.engine.step import Scheduled
from llama.model.ragged import PagedQueries, RaggedBatch, Segment, block_slots, slot_runs

# On a GPU, segments of so many tokens are decodes: one token, or with the guesses after it.
LONGEST_DECODE = 16


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
        paged=None if device.type == "cpu" else paged_queries(scheduled, block_size, device),
    )


def paged_queries(scheduled: Ordered[Scheduled], block_size: int, device: torch.device) -> PagedQueries | None:
    """The tokens of segments that are no longer than LONGEST_DECODE; None if there are none."""
    rows, tables, lengths, first = [], [], [], 0
    for item in scheduled:
        end = item.start + item.length
        if item.length <= LONGEST_DECODE:
            rows += range(first, first + item.length)
            lengths += range(item.start + 1, end + 1)
            tables += [item.sequence.table[:-(-end // block_size)]] * item.length
        first += item.length
    if not rows:
        return None
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for line, table in zip(padded, tables):
        line[:len(table)] = table
    parts = (np.asarray(rows, dtype=np.int32), padded, np.asarray(lengths, dtype=np.int32))
    return PagedQueries(*(torch.from_numpy(part).to(device) for part in parts), block_size, LONGEST_DECODE)


def _logit_rows(scheduled: Ordered[Scheduled]) -> list[int]:
    """The tokens after which one is drawn: each sequence's last known one and the guesses that follow it."""
    rows, first = [], 0
    for item in scheduled:
        last = first + item.length
        if item.samples:
            rows += range(last - 1 - len(item.draft), last)
        first = last
    return rows
