"""Gradients of one logit with respect to what passes any site, on the same modules that serve."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama.internals.trace import Edit, Scale, TracePlan
from llama.model.plan_tap import Part, PlanTap
from llama.model.ragged import RaggedBatch
from llama.model.selectors import changeable_places
from llama.model.transformer import Llama


@dataclass
class _Watched(Part):
    """A part that keeps the whole value of each site named, and lets a gradient come back to it."""

    names: frozenset[str] = frozenset()
    values: dict[str, Tensor] = field(default_factory=dict)

    def touch(self, name: str, value: Tensor) -> Tensor:
        value = super().touch(name, value)
        if name in self.names:
            if not value.requires_grad:  # the weights need no gradient, so here the graph begins
                value = value.detach().requires_grad_()
            self.values[name] = value
        return value


def gradients(model: Llama, ids: Sequence[int], sites: Sequence[str], token: int, against: int | None = None,
              position: int = -1, edits: Sequence[Edit] = ()) -> tuple[float, dict[str, Tensor]]:
    """The logit of `token` after a position (less that of `against`), and its gradients: by site, [tokens, ...].

    sites: patterns without brackets. edits are in force before. A value on which the logit does not depend has zeros.
    Scores, patterns and head_outs are recomputed so that the logit does depend on them. Raises PlanError.
    """
    config = model.config
    found = [place for number, pattern in enumerate(sites)
             for place in changeable_places(pattern, config, f"capture[{number}]")]
    recomputed = tuple(Scale(place.name, 1.0) for place in found if place.site.made_at is not None)
    batch = RaggedBatch.whole(torch.tensor(ids, device=model.device))
    bound = TracePlan(tuple(sites), edits=(*edits, *recomputed)).bind(config, len(ids), len(ids))
    every = range(len(ids))
    part = _Watched(bound, batch.segments[0], every, every,
                    names=frozenset(place.name for place in found))
    with torch.enable_grad():
        logits = model(batch, None, PlanTap([part], None, model.logits))[position]
        target = logits[token] if against is None else logits[token] - logits[against]
        values = list(part.values.values())
        grads = torch.autograd.grad(target, values, allow_unused=True)
    return target.item(), {name: torch.zeros_like(value) if grad is None else grad
                           for (name, value), grad in zip(part.values.items(), grads)}
