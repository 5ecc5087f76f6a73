"""Activation patching (arXiv:2202.05262): where, in a run that goes wrong, does a value of the right run put it right?

A sweep tries every layer, position and perhaps head. What stands before the patched position, and below the patched
layer, is as in the run that is patched: it is computed once, and every variant begins at its own layer and position,
over the keys and values of that one run. Many variants are one step.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.internals.direct import cached_batch, look
from llama.internals.trace import Replace, Trace, TraceError, TracePlan
from llama.model.cache import KVCache
from llama.model.plan_tap import Part, PlanTap
from llama.model.positions import PlanError
from llama.model.ragged import RaggedBatch, Segment
from llama.model.rope import rotation
from llama.model.transformer import Llama

# What variants are judged by: [variants, vocab] logits after the last token -> [variants].
Metric = Callable[[Tensor], Tensor]

# Tokens of one step, all variants together.
STEP_TOKENS = 1024


def logit_difference(answer: int, other: int) -> Metric:
    """How far the logit of `answer` is above that of `other`."""
    return lambda logits: logits[:, answer] - logits[:, other]


@dataclass(frozen=True)
class Sweep:
    """What each patch made of the metric: [layers, positions], or [layers, positions, heads].

    clean, corrupted: the metric of the two runs as they are. positions, layers: what the axes stand for.
    """

    values: Tensor
    clean: float
    corrupted: float
    layers: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def recovered(self) -> Tensor:
        """The same as a share of the way from the corrupted run, 0, to the clean one, 1."""
        return (self.values - self.corrupted) / (self.clean - self.corrupted)


@dataclass(frozen=True)
class _Variant:
    """One patch: a value for a place at a position."""

    position: int
    label: str
    value: Tensor


@torch.inference_mode()
def sweep(model: Llama, clean: Sequence[int], corrupted: Sequence[int], metric: Metric, site: str = "resid_post",
          by_head: bool = False, layers: Iterable[int] | None = None, positions: Iterable[int] | None = None,
          step_tokens: int = STEP_TOKENS) -> Sweep:
    """Put the clean run's value of one site into the corrupted run, each layer and position by itself, each head by
    itself if `by_head`.

    clean, corrupted: ids of two prompts of one length. site: within a layer, such as resid_post or attn.heads. layers,
    positions: those to try; None for all. Raises PlanError for a site that cannot be patched so.
    """
    if len(clean) != len(corrupted):
        raise PlanError("corrupted", f"the prompts have {len(clean)} and {len(corrupted)} tokens; patching goes "
                        "position by position, so make them equally long")
    config = model.config
    layers = tuple(range(config.num_layers) if layers is None else layers)
    positions = tuple(range(len(clean)) if positions is None else positions)
    names = {layer: f"layers.{layer}.{site}" for layer in layers}
    right, source = look(model, clean, TracePlan(tuple(names.values()), positions, max_bytes=1 << 40))
    num_heads = next(iter(source.values())).shape[1] if by_head else 1
    runner = _Runner(model, corrupted, step_tokens)
    rows = []
    for layer in layers:
        values = source[names[layer]]  # [positions, ...]
        variants = [_Variant(position, f"{names[layer]}[head={head}]" if by_head else names[layer],
                             values[row, head] if by_head else values[row])
                    for row, position in enumerate(positions) for head in range(num_heads)]
        rows.append(torch.cat([metric(logits) for logits in runner.run(layer, variants)]))
    found = torch.stack(rows).view(len(layers), len(positions), num_heads).float().cpu()
    return Sweep(found if by_head else found[..., 0], metric(right[-1:]).item(), metric(runner.logits).item(), layers,
                 positions)


class _Runner:
    """The corrupted run, computed once: its residual stream before every layer, and its keys and values."""

    def __init__(self, model: Llama, ids: Sequence[int], step_tokens: int):
        self.model = model
        self.ids = ids
        self.step_tokens = max(step_tokens, len(ids))
        self.cache = KVCache(model.config, len(ids) + self.step_tokens, 1, model.dtype, model.device)
        batch = cached_batch(ids, self.cache)
        plan = TracePlan(("layers.*.resid_pre",), max_bytes=1 << 40).bind(model.config, len(ids), len(ids))
        part = Part(plan, batch.segments[0], range(len(ids)), range(len(ids)))
        hidden = model.hidden(batch, self.cache, PlanTap([part], self.cache, model.logits))
        self.before = [one.value for one in part.captured]  # by layer, [tokens, hidden]
        self.logits = model.logits(hidden[-1:])

    def run(self, layer: int, variants: Sequence[_Variant]) -> Iterable[Tensor]:
        """The last token's logits of each variant, [variants, vocab], some at a time."""
        step: list[_Variant] = []
        room = self.step_tokens
        for variant in variants:
            length = len(self.ids) - variant.position
            if length > room:
                yield self._step(layer, step)
                step, room = [], self.step_tokens
            step.append(variant)
            room -= length
        yield self._step(layer, step)

    def _step(self, first_layer: int, variants: Sequence[_Variant]) -> Tensor:
        """All variants from their layer and their position on; before it they read the corrupted run's cache."""
        count, device = len(self.ids), self.model.device
        segments, parts, positions, first = [], [], [], 0
        for variant in variants:
            start, length = variant.position, count - variant.position
            own = count + first
            segments.append(Segment(start, length, (((0, start),) if start else ()) + ((own, own + length),)))
            plan = TracePlan(edits=(Replace(variant.label, variant.value, [start]),))
            bound = plan.bind(self.model.config, count, count)
            parts.append(Part(bound, segments[-1], range(first, first + length), range(start, count)))
            positions.append(torch.arange(start, count, device=device))
            first += length
        where = torch.cat(positions)  # [rows]
        batch = RaggedBatch(torch.tensor(self.ids, device=device)[where], where, tuple(segments),
                            torch.arange(count, count + first, device=device))
        tap = PlanTap(parts, self.cache, self.model.logits)
        rotary = rotation(batch.positions, self.model.frequencies)
        x = self.before[first_layer][where]  # [rows, hidden]
        for layer in range(first_layer, self.model.config.num_layers):
            x = self.model.blocks[layer](x, rotary, batch, self.cache, tap.layer(layer))
        last = torch.tensor([segment.length for segment in segments], device=device).cumsum(0) - 1
        return self.model.logits(x[last])


def steering_vector(towards: Sequence[Trace], away: Sequence[Trace], site: str, position: int = -1) -> Tensor:
    """The mean of a site over some prompts less that over others: a direction to Add (arXiv:2308.10248).

    position: at which token of each; -1 is the prompt's last. Returns one token's value. Raises TraceError where the
    site was not captured there.
    """
    if not towards or not away:
        raise TraceError("a steering vector needs at least one trace on each side")
    means = [torch.stack([trace.at(site, position) for trace in side]).mean(dim=0) for side in (towards, away)]
    return means[0] - means[1]
