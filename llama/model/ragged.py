"""What the model is given in one step: tokens of many sequences on one axis.

A prefill chunk, a decode and any mixture of them have this one shape. Every matrix sees `[tokens]` rows; only
attention looks at where one sequence ends and the next begins.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """One sequence's share of a step: `length` consecutive tokens whose first stands at position `start`.

    runs: the cache slots of positions 0 .. start + length - 1, as half-open ranges in order. Blocks that lie
    side by side make one run, which the CPU reads as a view. Empty where there is no cache (then start is 0).
    """

    start: int
    length: int
    runs: tuple[tuple[int, int], ...] = ()

    @property
    def end(self) -> int:
        """Positions that the sequence has once this step has run: its context length."""
        return self.start + self.length


@dataclass(frozen=True)
class Queries:
    """Some tokens of a step, and where the keys that each may see lie.

    rows: [queries], int64, their places among the step's tokens. first, length: [queries], int64, their context as
    slots[first : first + length]. slots: int32, of all contexts, one after another.
    """

    rows: Tensor
    first: Tensor
    length: Tensor
    slots: Tensor


@dataclass(frozen=True)
class PagedQueries:
    """Some tokens of a step, and where the keys that each may see lie, as tensors of one shape whatever the contexts are:
    what a GPU reads, and what a captured graph can be given anew.

    rows: [queries], int32, their places among the step's tokens. tables: [queries, blocks], int32, each one's block
    table; what stands beyond its context is not looked at. lengths: [queries], int32, how many positions each sees.
    block_size: positions of a block. longest: every token of segments no longer than this is among them.
    """

    rows: Tensor
    tables: Tensor
    lengths: Tensor
    block_size: int
    longest: int


@dataclass(frozen=True)
class Chunks:
    """Segments of a step, and where the keys that their tokens may see lie, for a GPU.

    rows: [segments], int32, their first tokens' places among the step's tokens. lengths: [segments], int32, how many
    positions the first token sees; each next one sees one more. counts: [segments], int32, their tokens. first: [segments],
    int32: their slots are slots[first:]. slots: int32, of all contexts, one after another. longest: the largest count. most:
    the longest context.
    """

    rows: Tensor
    lengths: Tensor
    counts: Tensor
    first: Tensor
    slots: Tensor
    longest: int
    most: int


@dataclass(frozen=True)
class RaggedBatch:
    """The tokens of one step.

    ids, positions: [tokens], int64. slots: [tokens], int64, where in the cache each token's key and value are
    written; None without a cache. segments: one per sequence, in the order of its tokens. logit_rows: [rows],
    int64, the tokens whose next-token logits are wanted; None for all. paged: on a GPU, the tokens of short segments; if
    these are all, `segments` may be empty.
    """

    ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    slots: Tensor | None = None
    logit_rows: Tensor | None = None
    paged: PagedQueries | None = None

    @classmethod
    def whole(cls, ids: Tensor) -> "RaggedBatch":
        """Complete sequences without a cache, for training, scoring and gradients.

        ids: [tokens] is one sequence, [sequences, tokens] several of the same length.
        """
        rows = ids if ids.dim() == 2 else ids[None]
        count, length = rows.shape
        positions = torch.arange(length, device=ids.device).repeat(count)
        return cls(rows.reshape(-1), positions, (Segment(0, length),) * count)

    @cached_property
    def decodes(self) -> Queries | None:
        """The tokens that are alone in their segments; None if there are none."""
        return _queries(self.segments, 1)

    @cached_property
    def each(self) -> Queries:
        """Every token, as if it were decoded."""
        return _queries(self.segments, max(segment.length for segment in self.segments))

    @cached_property
    def chunks(self) -> Chunks | None:
        """The segments whose tokens are not in `paged`; None if there are none."""
        longest = 0 if self.paged is None else self.paged.longest
        rows, lengths, counts, first, slots = [], [], [], [], []
        row = begin = 0
        for segment in self.segments:
            if segment.length > longest:
                for column, number in zip((rows, lengths, counts, first), (row, segment.start + 1, segment.length, begin)):
                    column.append(number)
                slots += [np.arange(*run, dtype=np.int32) for run in segment.runs]
                begin += segment.end
            row += segment.length
        if not rows:
            return None
        device = self.positions.device
        table = torch.tensor([rows, lengths, counts, first], dtype=torch.int32, device=device)  # [4, segments]
        return Chunks(*table, torch.from_numpy(np.concatenate(slots)).to(device), max(counts),
                      max(start + count - 1 for start, count in zip(lengths, counts)))


def _queries(segments: tuple[Segment, ...], longest: int) -> Queries | None:
    """The tokens of segments that are no longer than this."""
    rows, first, length, slots = [], [], [], []
    row = begin = 0
    for segment in segments:
        if segment.length <= longest:
            rows.append(np.arange(row, row + segment.length))
            first.append(np.full(segment.length, begin))
            length.append(np.arange(segment.start + 1, segment.end + 1))
            slots += [np.arange(*run, dtype=np.int32) for run in segment.runs]
            begin += segment.end
        row += segment.length
    if not rows:
        return None
    return Queries(*(torch.from_numpy(np.concatenate(part)) for part in (rows, first, length, slots)))


def block_slots(table: np.ndarray, start: int, end: int, block_size: int) -> np.ndarray:
    """The cache slots of positions start .. end - 1 of a sequence with this block table: [end - start], int64."""
    positions = np.arange(start, end)
    return table[positions // block_size] * block_size + positions % block_size


def slot_runs(table: np.ndarray, end: int, block_size: int) -> tuple[tuple[int, int], ...]:
    """`Segment.runs`: the slots of positions 0 .. end - 1, with blocks that lie side by side joined."""
    breaks = np.flatnonzero(np.diff(table) != 1) + 1
    runs = []
    for group in np.split(table, breaks):
        first, count = int(group[0]) * block_size, min(len(group) * block_size, end)
        runs.append((first, first + count))
        end -= count
    return tuple(runs)
