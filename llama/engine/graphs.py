"""Decode steps as graphs: what a step of so many tokens does is captured once and then replayed, with other numbers.

The numbers are in tensors that stay where they are. A step with fewer tokens than its graph has rows is filled up: such a
row writes its key and value into the cache's spare block, reads nothing else, and nobody reads its logits.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence as Ordered

import numpy as np
import torch
from torch import Tensor

from llama.engine.batch import LONGEST_DECODE
from llama.engine.device import CudaDevice
from llama.engine.step import Plan, Scheduled
from llama.engine.tracing import Caught
from llama.engine.upload import num_bytes, upload
from llama.model.cache import KVCache
from llama.model.plan_tap import Part, PlanTap
from llama.model.ragged import PagedQueries, RaggedBatch, Segment
from llama.model.tap import UNTOUCHED
from llama.model.transformer import Llama

# The numbers of rows that graphs have, up to as many as may run: a step takes hardly longer for a few rows more.
BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# Graphs that look at something or change it, of which so many are kept: those that were used last.
MAX_TRACED = 16


class DecodeGraphs:
    """The graphs of one model on one cache, each captured when it is first needed.

    max_rows: of a step. max_context: positions of the longest sequence.
    """

    def __init__(self, model: Llama, cache: KVCache, device: CudaDevice, max_rows: int, max_context: int):
        self._model = model
        self._cache = cache
        self._device = device
        self._buckets = [*(rows for rows in BUCKETS if rows < max_rows), max_rows]
        self._table_width = -(-max_context // cache.block_size)
        self._plain: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._traced: OrderedDict[Hashable, _Graph] = OrderedDict()

    def run(self, plan: Plan, drawn: Tensor | None) -> tuple[Tensor, list[Caught]] | None:
        """Enqueue a step: its logits, [tokens, vocab], until the next step, and what its trace plans captured. None, and
        nothing is done, if this is no step of decodes, or one that looks at what no graph can.

        drawn: [rows], int64, the ids that the step before this one draws, if the plan follows it.
        """
        items, num_rows = plan.scheduled, sum(item.length for item in plan.scheduled)
        if num_rows > self._buckets[-1] or not all(item.is_decode for item in items):
            return None
        traced = [item for item in items if item.sequence.plan is not None]
        names = [item.sequence.plan.replayable(item.start) for item in traced]
        if None in names or any(item.draft for item in traced):
            return None
        rows = next(rows for rows in self._buckets if rows >= num_rows)
        return self._graph(rows, traced, (rows, *names)).replay(plan, drawn)

    def _graph(self, rows: int, traced: Ordered[Scheduled], key: Hashable) -> "_Graph":
        graphs = self._traced if traced else self._plain
        if key not in graphs:
            graphs[key] = _Graph(self._model, self._cache, self._device, rows, self._table_width, traced)
        graphs.move_to_end(key)
        if len(self._traced) > MAX_TRACED:
            self._traced.popitem(last=False)
        return graphs[key]


class _Graph:
    """One graph of so many rows, and its inputs. width: of the block tables. traced: those who have a plan, in their
    order; whoever is in their places later has the same done at every site."""

    def __init__(self, model: Llama, cache: KVCache, device: CudaDevice, rows: int, width: int,
                 traced: Ordered[Scheduled]):
        self._rows, self._cache, self._place = rows, cache, model.device
        self._tables = torch.zeros(rows, width, dtype=torch.int32, device=model.device)
        empty = self._numbers(Plan(), range(len(traced)))
        most = num_bytes(*empty[:-1], np.empty(self._tables.shape, dtype=np.int32))
        self._buffer = torch.empty(most, dtype=torch.uint8, device=model.device)
        self._ids, positions, slots, self._sources, places, lengths = self._load(empty)
        own = torch.arange(rows, dtype=torch.int32, device=model.device)
        batch = RaggedBatch(self._ids, positions, (), slots,
                            paged=PagedQueries(own, self._tables, lengths, cache.block_size, LONGEST_DECODE))
        self._parts = [Part(item.sequence.plan, Segment(item.start, 1), (0,), (item.start,), place=place)
                       for item, place in zip(traced, places.split(1))]
        at = PlanTap(self._parts, cache, model.logits) if traced else UNTOUCHED

        def run() -> Tensor:
            for part in self._parts:
                part.captured.clear()
            return model(batch, cache, at)

        self._replay, self._logits = device.capture(run)

    def replay(self, plan: Plan, drawn: Tensor | None) -> tuple[Tensor, list[Caught]]:
        """See DecodeGraphs.run."""
        first_rows = np.cumsum([0, *(item.length for item in plan.scheduled)]).tolist()
        traced = [(item, row) for item, row in zip(plan.scheduled, first_rows) if item.sequence.plan is not None]
        self._load(self._numbers(plan, [row for _, row in traced]))
        if drawn is not None:
            torch.index_select(drawn, 0, self._sources, out=self._ids)
        self._replay()
        caught = [Caught(item.sequence, one.label, (item.start,), one.value)
                  for (item, _), part in zip(traced, self._parts, strict=True) for one in part.captured]
        return self._logits[:first_rows[-1]], caught

    def _numbers(self, plan: Plan, places: Ordered[int]) -> tuple[np.ndarray, ...]:
        """What the graph is given: [rows] each of ids, positions, slots, and which rows of the step before draw the ids;
        [traced], the rows that have a plan; [rows], how many positions each sees; [rows, blocks], as many columns of the
        block tables as are in use."""
        block_size, spare = self._cache.block_size, self._cache.spare_slot
        tokens = [(item, position) for item in plan.scheduled for position in range(item.start, item.start + item.length)]
        ids, positions, slots, sources = np.zeros((4, self._rows), dtype=np.int64)
        lengths = np.ones(self._rows, dtype=np.int32)
        used = max((position // block_size + 1 for _, position in tokens), default=1)
        columns = np.zeros((self._rows, used), dtype=np.int32)
        slots[len(tokens):], columns[len(tokens):, 0] = spare, spare // block_size  # the rows that fill the step up
        for row, (item, position) in enumerate(tokens):
            table = item.sequence.table[:position // block_size + 1]
            columns[row, :len(table)] = table
            slots[row] = table[-1] * block_size + position % block_size
            positions[row], lengths[row] = position, position + 1
        if plan.follows is None:
            ids[:len(tokens)] = [token_id for item in plan.scheduled for token_id in item.ids]
        else:
            sources[:len(tokens)] = plan.follows
        return ids, positions, slots, sources, np.array(places, dtype=np.int64), lengths, columns

    def _load(self, numbers: tuple[np.ndarray, ...]) -> list[Tensor]:
        """Bring the numbers to where the graph reads them, in one copy; these places, without the tables."""
        *inputs, columns = upload(self._place, *numbers, into=self._buffer)
        self._tables[:, :columns.shape[1]].copy_(columns)
        return inputs
