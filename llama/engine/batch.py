"""A plan as what model and sampler are given: the ragged batch, and what is drawn after which of its rows."""

from collections.abc import Collection, Iterable, Sequence as Ordered

import numpy as np
import torch

from llama.engine.constraint import ConstraintError
from llama.engine.sampler import SampleRow
from llama.engine.step import Scheduled
from llama.engine.upload import upload
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
    numbers = (np.array(ids, dtype=np.int64), np.concatenate(positions), np.concatenate(slots),
               np.array(_logit_rows(scheduled), dtype=np.int64))
    paged = () if device.type == "cpu" else _paged_numbers(scheduled, block_size)
    ids, positions, slots, logit_rows, *paged = upload(device, *numbers, *paged)
    return RaggedBatch(ids, positions, tuple(segments), slots, logit_rows,
                       PagedQueries(*paged, block_size, LONGEST_DECODE) if paged else None)


def _paged_numbers(scheduled: Ordered[Scheduled], block_size: int) -> tuple[np.ndarray, ...]:
    """`PagedQueries` of the tokens of segments that are no longer than LONGEST_DECODE; nothing if there are none."""
    rows, tables, lengths, first = [], [], [], 0
    for item in scheduled:
        end = item.start + item.length
        if item.length <= LONGEST_DECODE:
            rows += range(first, first + item.length)
            lengths += range(item.start + 1, end + 1)
            tables += [item.sequence.table[:-(-end // block_size)]] * item.length
        first += item.length
    if not rows:
        return ()
    padded = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
    for line, table in zip(padded, tables):
        line[:len(table)] = table
    return np.asarray(rows, dtype=np.int32), padded, np.asarray(lengths, dtype=np.int32)


def _logit_rows(scheduled: Ordered[Scheduled]) -> list[int]:
    """The tokens after which one is drawn: each sequence's last known one and the guesses that follow it."""
    rows, first = [], 0
    for item in scheduled:
        last = first + item.length
        if item.samples:
            rows += range(last - 1 - len(item.draft), last)
        first = last
    return rows


def sample_rows(scheduled: Ordered[Scheduled], eos_token_ids: Collection[int]) -> tuple[list[int], list[SampleRow]]:
    """For each token that is drawn, after which row of logits, and what the sampler must know: for every sample of a
    sequence, one row after the last known token, and one after each guess. Raises ConstraintError."""
    places, rows, first = [], [], 0
    for item in scheduled:
        if item.samples:
            masks = _masks(item)
            for index in item.sequence.samples:
                rows += _rows_of(item, index, masks, eos_token_ids)
                places += range(first, first + 1 + len(item.draft))
            first += 1 + len(item.draft)
    return places, rows


def _rows_of(item: Scheduled, index: int, masks: Ordered[np.ndarray | None], eos_token_ids: Collection[int]
             ) -> list[SampleRow]:
    """One row for the token after the last known one, and one after each guess, as if those were known."""
    sequence, params = item.sequence, item.sequence.request.params
    rows, counts = [], sequence.counts
    prompt_ids = () if params.repetition_penalty == 1 else sequence.distinct_prompt_ids
    for guessed in range(1 + len(item.draft)):
        if guessed:
            counts = counts.copy()
            counts[item.draft[guessed - 1]] += 1
        position, mask, banned = item.num_known + guessed, masks[guessed], ()
        if position - sequence.num_prompt < params.min_tokens:
            banned = (*eos_token_ids, *params.stop_token_ids)
            if mask is not None and not _leaves_any(mask, banned):
                banned = ()  # the text is whole: its grammar has nothing more to say
        rows.append(SampleRow(params, sequence.seed, index, position, prompt_ids, counts, banned, mask))
    return rows


def _masks(item: Scheduled) -> Ordered[np.ndarray | None]:
    """What the grammar allows in each of a sequence's rows, if it has one. Raises ConstraintError."""
    constraint = item.sequence.constraint
    if constraint is None:
        return [None] * (1 + len(item.draft))
    try:
        return constraint.masks(item.draft)
    except ValueError as error:
        raise ConstraintError(item.sequence, str(error)) from error


def _leaves_any(mask: np.ndarray, banned: Iterable[int]) -> bool:
    """Whether a mask ([bytes], a bit an id) allows anything but these ids."""
    left = mask.copy()
    for token_id in banned:
        left[token_id // 8:token_id // 8 + 1] &= 255 ^ 1 << token_id % 8  # none there: a row without an id
    return bool(left.any())
