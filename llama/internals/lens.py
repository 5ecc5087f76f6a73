"""Reading a trace: what each layer would have said, who said it, and where the heads look.

    trace = llm.trace(prompt, LENS_SITES + ATTRIBUTION_SITES)
    logit_lens(llm.model, trace).ids[:, -1, 0]                        # by layer, the likeliest next token
    attribute(llm.model, trace, token).heads                          # [layers, heads], in logits
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.internals.direct import look
from llama.internals.trace import Trace, TraceError, TracePlan
from llama.model.transformer import Llama

LENS_SITES = ("embed", "layers.*.resid_post")
ATTRIBUTION_SITES = ("embed", "layers.*.attn.head_out", "layers.*.mlp_out", "final_norm.scale")

# Rows of logits that are in memory at once: at 128,256 ids, 33 MB in float32.
_ROWS = 64


@dataclass(frozen=True)
class LensTable:
    """What every layer would have said next, at every position. The first row is the embedding's.

    names: of the rows. positions: of the columns. ids, logprobs: [rows, positions, k], the likeliest first.
    next_logprobs: [rows, positions], of the token that did come; NaN where none did. entropy: [rows, positions], nats.
    """

    names: tuple[str, ...]
    positions: tuple[int, ...]
    ids: Tensor
    logprobs: Tensor
    next_logprobs: Tensor
    entropy: Tensor


@torch.inference_mode()
def logit_lens(model: Llama, trace: Trace, k: int = 5,
               translators: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> LensTable:
    """Final norm and head on the residual stream after each layer (LessWrong, "interpreting GPT: the logit lens").

    trace: of LENS_SITES. translators: by name of the row, what is done to [positions, hidden] before, which makes it a
    tuned lens (arXiv:2303.08112). Raises TraceError if the residual streams were not captured.
    """
    names = [name for name in LENS_SITES[:1] if name in trace.values] + trace.names(LENS_SITES[1])
    positions = trace.positions[names[0]]
    following = [trace.ids[position + 1] if position + 1 < len(trace.ids) else -1 for position in positions]
    wanted = torch.tensor(following, device=model.device)
    rows: list[list[Tensor]] = []
    for name in names:
        hidden = trace[name].to(model.device, model.dtype)
        if translators is not None and name in translators:
            hidden = translators[name](hidden)
        pieces = [_read(model, part, target, k) for part, target in zip(hidden.split(_ROWS), wanted.split(_ROWS))]
        rows.append([torch.cat(part).cpu() for part in zip(*pieces)])
    ids, logprobs, following_logprobs, entropy = (torch.stack(part) for part in zip(*rows))
    return LensTable(tuple(names), positions, ids, logprobs, following_logprobs, entropy)


def _read(model: Llama, hidden: Tensor, wanted: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs = model.logits(hidden).log_softmax(dim=-1)  # [rows, vocab]
    best, ids = logprobs.topk(min(k, logprobs.shape[1]), dim=-1)
    came = logprobs.gather(1, wanted.clamp(min=0)[:, None])[:, 0].masked_fill(wanted < 0, torch.nan)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1)
    return ids, best, came, entropy


@dataclass(frozen=True)
class Attribution:
    """Who said it: parts of one logit, which add up to it. heads: [layers, heads]; mlps: [layers]; embed: a number."""

    embed: float
    heads: Tensor
    mlps: Tensor

    @property
    def logit(self) -> float:
        """The sum: the logit itself, or the difference of two."""
        return self.embed + self.heads.sum().item() + self.mlps.sum().item()


@torch.inference_mode()
def attribute(model: Llama, trace: Trace, token: int, against: int | None = None, position: int = -1) -> Attribution:
    """Direct logit attribution: each part's share of token's logit, or of how far it is above that of `against`.

    The residual stream is a sum, and final norm and head are linear once the norm's scale is held at what it was.
    trace: of ATTRIBUTION_SITES. Raises TraceError where one is missing.
    """
    names = [trace.names(pattern) for pattern in ATTRIBUTION_SITES]
    num_layers, num_heads = model.config.num_layers, model.config.num_heads
    parts = torch.cat([trace.at(names[0][0], position)[None],
                       *(trace.at(name, position) for name in names[1]),
                       *(trace.at(name, position)[None] for name in names[2])]).to(model.device)
    if len(parts) != 1 + num_layers * (num_heads + 1):
        raise TraceError(f"attribution needs {', '.join(ATTRIBUTION_SITES)} of all {num_layers} layers")
    scale = trace.at(names[3][0], position).to(model.device)
    normed = (parts * scale * model.norm.weight.float()).to(model.dtype)
    chosen = [token] if against is None else [token, against]
    logits = torch.cat([model.head(rows, wide=True)[:, chosen] for rows in normed.split(_ROWS)]).cpu()
    shares = logits[:, 0] if against is None else logits[:, 0] - logits[:, 1]
    heads = shares[1:1 + num_layers * num_heads].view(num_layers, num_heads)
    return Attribution(shares[0].item(), heads, shares[1 + num_layers * num_heads:])


def norms(trace: Trace, pattern: str = "layers.*.resid_post") -> Tensor:
    """Euclidean lengths, [names, positions], of all that a pattern matches."""
    return trace.stack(pattern).flatten(2).norm(dim=-1)


def previous_token_scores(trace: Trace) -> Tensor:
    """How much of its attention each head gives to the token just before: [layers, heads], 0 to 1.

    trace: of layers.*.attn.pattern at all positions of the prompt.
    """
    patterns = trace.stack("layers.*.attn.pattern")  # [layers, positions, heads, context]
    return patterns.diagonal(-1, dim1=1, dim2=3).mean(dim=-1)


def induction_scores(model: Llama, length: int = 32, repeats: int = 4, seed: int = 0, vocabulary: int | None = None
                     ) -> Tensor:
    """How much each head attends to what followed the current token the last time: [layers, heads], 0 to 1.

    Measured on random ids (the first `vocabulary` of all; None: every one), each text of `length` ids said twice: in
    the second half, on the position after the earlier occurrence (arXiv:2209.11895). A mean over `repeats` texts.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(repeats):
        ids = torch.randint(vocabulary or model.config.vocab_size, (length,), generator=generator).tolist() * 2
        _, found = look(model, ids, TracePlan(("layers.*.attn.pattern",), slice(length, None)))
        patterns = torch.stack(list(found.values()))  # [layers, length, heads, 2 * length]
        scores.append(patterns[..., 1:].diagonal(0, dim1=1, dim2=3).mean(dim=-1).cpu())
    return torch.stack(scores).mean(dim=0)
