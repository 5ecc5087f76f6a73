"""The engine's side of trace plans: from requests to the tap of a step, and what it caught."""

from collections.abc import Sequence as Ordered
from typing import NamedTuple

import torch
from torch import Tensor

from llama.config import LlamaConfig
from llama.engine.request import Request, RequestError
from llama.engine.sequence import Sequence
from llama.engine.step import Scheduled
from llama.model.cache import KVCache
from llama.model.plan import BoundPlan
from llama.model.plan_tap import Part, PlanTap
from llama.model.positions import PlanError
from llama.model.ragged import RaggedBatch
from llama.model.tap import UNTOUCHED, Tap
from llama.model.transformer import Llama

# Rows of logits that are computed at once only to be looked at.
_ROWS = 128


def bound_plan(request: Request, config: LlamaConfig, max_ids: int) -> BoundPlan:
    """The request's plan for this model. Raises RequestError, whose field is `trace`; its message names the part."""
    if request.params.n > 1:
        raise RequestError("n", "a request with a trace plan has one sample; send it again for another")
    try:
        return request.trace.bind(config, len(request.prompt_ids), max(max_ids - 1, len(request.prompt_ids)))
    except PlanError as error:
        raise RequestError("trace", f"trace plan, {error}") from error


def step_tap(scheduled: Ordered[Scheduled], batch: RaggedBatch, model: Llama, cache: KVCache) -> Tap:
    """The tap for a step: it looks only at the tokens of sequences that have a plan."""
    parts, first = [], 0
    for item, segment in zip(scheduled, batch.segments, strict=True):
        if item.sequence.plan is not None:
            rows = range(first, first + item.length)
            parts.append(Part(item.sequence.plan, segment, rows, range(segment.start, segment.end)))
        first += item.length
    return PlanTap(parts, cache, model.logits) if parts else UNTOUCHED


def look_at_logits(model: Llama, hidden: Tensor, batch: RaggedBatch, at: Tap) -> None:
    """Compute final norm and logits of the tokens that are captured there and after which nothing was drawn."""
    if not isinstance(at, PlanTap):
        return
    drawn = set(batch.logit_rows.tolist())
    wanted = [row for part in at.parts for row, position in zip(part.rows, part.positions)
              if row not in drawn and any(position in where for where in part.plan.last_wanted)]
    for rows in torch.tensor(wanted, dtype=torch.int64, device=hidden.device).split(_ROWS):
        if len(rows):
            model.logits(hidden[rows], at.rows(rows))


class Caught(NamedTuple):
    """What the tap caught of one sequence of a step: one place, at these positions; [positions, ...], on the device."""

    sequence: Sequence
    label: str
    positions: tuple[int, ...]
    value: Tensor


def caught(scheduled: Ordered[Scheduled], at: Tap) -> list[Caught]:
    """What the tap caught in a step."""
    if not isinstance(at, PlanTap):
        return []
    traced = [item.sequence for item in scheduled if item.sequence.plan is not None]
    return [Caught(sequence, *one) for sequence, part in zip(traced, at.parts, strict=True) for one in part.captured]
