"""Our model run with a plan, outside of the engine: over a test's own pages, or whole."""

import torch
from torch import Tensor

from llama.model.plan import BoundPlan, TracePlan
from llama.model.plan_tap import Captured, Part, PlanTap
from llama.model.ragged import RaggedBatch
from llama.model.transformer import Llama
from tests.model.pairs import Pages


def bound(model: Llama, plan: TracePlan, num_prompt: int) -> BoundPlan:
    """The plan for a prompt after which nothing is generated."""
    return plan.bind(model.config, num_prompt, num_prompt)


def tapped(pages: Pages, plans: dict[str, BoundPlan], *parts: tuple[str, list[int]]
           ) -> tuple[Tensor, dict[str, list[Captured]]]:
    """One step in which some sequences have a plan: the logits, and what was captured of each."""
    batch = pages.batch(*parts)
    taps, first = {}, 0
    for (name, ids), segment in zip(parts, batch.segments):
        if name in plans:
            taps[name] = Part(plans[name], segment, range(first, first + len(ids)), range(segment.start, segment.end))
        first += len(ids)
    logits = pages.model(batch, pages.cache, PlanTap([*taps.values()], pages.cache, pages.model.logits))
    return logits, {name: part.captured for name, part in taps.items()}


def whole(model: Llama, ids: list[int], plan: TracePlan) -> tuple[Tensor, list[Captured]]:
    """A whole sequence without a cache: the logits, and what was captured."""
    batch = RaggedBatch.whole(torch.tensor(ids))
    part = Part(bound(model, plan, len(ids)), batch.segments[0], range(len(ids)), range(len(ids)))
    return model(batch, None, PlanTap([part], None, model.logits)), part.captured


def by_label(captured: list[Captured]) -> dict[str, Tensor]:
    """Each label's rows, of one step or several, one after another."""
    rows: dict[str, list[Tensor]] = {}
    for one in captured:
        rows.setdefault(one.label, []).append(one.value)
    return {label: _joined(parts, -torch.inf if "scores" in label else 0.0) for label, parts in rows.items()}


def _joined(parts: list[Tensor], fill: float) -> Tensor:
    width = max(part.shape[-1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=fill) for part in parts])
