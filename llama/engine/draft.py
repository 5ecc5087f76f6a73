"""A smaller model that guesses for the larger one (arXiv:2211.17192): same vocabulary, its own cache.

Its guesses are its likeliest tokens, so that `llama.engine.propose` holds for them too: verified by comparing,
lossless whatever the draft model is worth.
"""

from array import array
from dataclasses import dataclass, field

import numpy as np
import torch

from llama.engine.blocks import BlockPool
from llama.engine.sequence import Sequence
from llama.model.cache import KVCache
from llama.model.ragged import RaggedBatch, Segment, block_slots, slot_runs
from llama.model.transformer import Llama


@dataclass
class _Progress:
    """What the draft model has computed of one sequence: these ids, in these blocks."""

    ids: array = field(default_factory=lambda: array("q"))
    table: list[int] = field(default_factory=list)


class DraftModel:
    """Greedy continuations by a draft model, at most `max_draft` tokens long; fewer while they keep failing."""

    def __init__(self, model: Llama, num_blocks: int, block_size: int, max_draft: int = 4):
        self.model = model
        self.max_draft = max_draft
        self.cache = KVCache(model.config, num_blocks, block_size, model.dtype, model.device)
        self.pool = BlockPool(num_blocks, block_size)
        self._progress: dict[Sequence, _Progress] = {}

    def propose(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """See `llama.engine.propose.Proposer`. None where the draft model's context or cache is full."""
        most = min(most, max(1, round(self.max_draft * sequence.draft_success)))
        progress = self._progress.setdefault(sequence, _Progress())
        end = len(sequence.ids) + most
        missing = -(-end // self.pool.block_size) - len(progress.table)
        if end > self.model.config.max_position_embeddings or missing > self.pool.num_available:
            return ()
        if missing > 0:
            progress.table += self.pool.allocate(missing, progress.table[-1] if progress.table else None)
        known = sequence.ids
        start = min(_common_length(progress.ids, known), len(known) - 1)  # wrong guesses are computed anew
        draft: list[int] = []
        pending = known[start:].tolist()
        for _ in range(most):
            draft.append(self._next(progress.table, start, pending))
            start += len(pending)
            pending = draft[-1:]
        progress.ids = known + array("q", draft[:-1])
        return tuple(draft)

    def forget(self, sequence: Sequence) -> None:
        """Give back what the draft model keeps for a sequence that has left."""
        if sequence in self._progress:
            self.pool.release(self._progress.pop(sequence).table)

    def _next(self, table: list[int], start: int, ids: list[int]) -> int:
        """The likeliest token after `ids`, which stand from position `start` on."""
        end, block_size, device = start + len(ids), self.pool.block_size, self.model.device
        blocks = np.asarray(table[:-(-end // block_size)])
        batch = RaggedBatch(
            ids=torch.tensor(ids, device=device),
            positions=torch.arange(start, end, device=device),
            segments=(Segment(start, len(ids), slot_runs(blocks, end, block_size)),),
            slots=torch.from_numpy(block_slots(blocks, start, end, block_size)).to(device),
            logit_rows=torch.tensor([len(ids) - 1], device=device),
        )
        return int(self.model(batch, self.cache)[0].argmax())


def _common_length(ours: array, theirs: array) -> int:
    """How many ids two sequences begin with alike."""
    shorter = min(len(ours), len(theirs))
    one, other = (np.frombuffer(ids, dtype=np.int64)[:shorter] for ids in (ours, theirs))
    different = np.flatnonzero(one != other)
    return int(different[0]) if len(different) else shorter
