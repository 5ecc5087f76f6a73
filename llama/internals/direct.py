"""The model run with a plan, without the engine: one sequence, whole, in one step; differentiable."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llama.model.cache import KVCache
from llama.model.plan import TracePlan
from llama.model.plan_tap import Part, PlanTap
from llama.model.ragged import RaggedBatch, Segment
from llama.model.transformer import Llama


@torch.inference_mode()
def look(model: Llama, ids: Sequence[int], plan: TracePlan) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits [tokens, vocab] of a prompt under a plan, and its captures by name, [positions, ...], in their own dtype.

    Raises PlanError.
    """
    device = model.device
    batch = RaggedBatch.whole(torch.tensor(ids, device=device))
    every = range(len(ids))
    part = Part(plan.bind(model.config, len(ids), len(ids)), batch.segments[0], every, every)
    logits = model(batch, None, PlanTap([part], None, model.logits))
    return logits, {one.label: one.value for one in part.captured}


def cached_batch(ids: Sequence[int], cache: KVCache, start: int = 0) -> RaggedBatch:
    """Tokens from position `start` on of the one sequence that a cache holds, position p in slot p."""
    device, end = cache.keys.device, start + len(ids)
    positions = torch.arange(start, end, device=device)
    return RaggedBatch(torch.tensor(ids, device=device), positions, (Segment(start, len(ids), ((0, end),)),), positions)
