"""Logits to ids and log probabilities: all rows at once, each by its own parameters.

What one row draws depends on its own logits, parameters and (seed, index, position) alone, never on its
company: a seed means the same by itself, in any batch, and after a preemption.
"""

from collections.abc import Mapping, Sequence as Ordered
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama.engine.request import SamplingParams, TokenLogprob

# The likeliest tokens nearly always hold the nucleus; only a row that they do not suffice is sorted whole.
NUM_CANDIDATES = 1024

# Below it, whatever is less likely than the likeliest has no chance in float32.
LOWEST_TEMPERATURE = 1e-30


@dataclass(frozen=True)
class SampleRow:
    """What the sampler must know of one row of logits.

    params: with every default filled. seed, index, position: fix the draw. prompt_ids, counts: what the
    penalties look at; counts holds the generated ids. banned: ids that must not be drawn here. mask: the ids that
    may be, at least one, if not all: [bytes], uint8, a bit for each, the lowest of a byte first.
    """

    params: SamplingParams
    seed: int
    index: int
    position: int
    prompt_ids: Ordered[int] | np.ndarray = ()
    counts: Mapping[int, int] | None = None
    banned: Ordered[int] = ()
    mask: np.ndarray | None = None


def sample(logits: Tensor, rows: Ordered[SampleRow]) -> list[TokenLogprob]:
    """Draw one token a row. logits: [rows, vocab], float32, left as they are."""
    adjusted = adjust(logits, rows)
    ids = adjusted.argmax(dim=-1)
    plain = [place for place, row in enumerate(rows) if row.params.temperature > 0 and not _is_filtered(row.params)]
    filtered = [place for place, row in enumerate(rows) if row.params.temperature > 0 and _is_filtered(row.params)]
    for places, draw in ((plain, _draw_from_all), (filtered, _draw_from_likeliest)):
        if places:
            chosen = [rows[place] for place in places]
            ids[places] = draw(_probabilities(adjusted[places], chosen), chosen)
    return log_probabilities(logits, ids.tolist(), [row.params.logprobs for row in rows])


def _probabilities(adjusted: Tensor, rows: Ordered[SampleRow]) -> Tensor:
    """Each row's distribution at its own temperature: [rows, vocab]. However low that is, it stays finite."""
    temperature = _column([max(row.params.temperature, LOWEST_TEMPERATURE) for row in rows], adjusted.device)
    return torch.softmax((adjusted - adjusted.amax(dim=-1, keepdim=True)) / temperature, dim=-1)


def log_probabilities(logits: Tensor, ids: Ordered[int], wanted: Ordered[int | None]) -> list[TokenLogprob]:
    """Each id with its natural-log probability in its row of raw logits [rows, vocab], and the `wanted` number
    of likeliest alternatives. Rows that want None get no probability."""
    results = [TokenLogprob(token_id, None) for token_id in ids]
    for count in {*wanted} - {None}:  # each by itself: which of equals are taken must not hang on what others want
        places = [place for place, one in enumerate(wanted) if one == count]
        logprobs = torch.log_softmax(logits if len(places) == len(ids) else logits[places], dim=-1)
        chosen = logprobs.gather(1, torch.tensor([[ids[place]] for place in places], device=logits.device))
        top, top_ids = logprobs.topk(min(count, logprobs.shape[-1]))
        for place, own, values, names in zip(places, chosen[:, 0].tolist(), top.tolist(), top_ids.tolist()):
            results[place] = TokenLogprob(ids[place], own, tuple(zip(names, values)))
    return results


def adjust(logits: Tensor, rows: Ordered[SampleRow]) -> Tensor:
    """Penalties, biases, bans and masks: [rows, vocab]; the input itself where no row asks for any."""
    adjusted = logits
    for place, row in enumerate(rows):
        params, counts = row.params, row.counts or {}
        repetition = params.repetition_penalty not in (None, 1)
        penalised = counts and (params.frequency_penalty or params.presence_penalty)
        if not (repetition or penalised or params.logit_bias or row.banned):
            continue
        if adjusted is logits:
            adjusted = logits.clone()
        line = adjusted[place]  # [vocab], a view
        if repetition:
            seen = np.asarray(row.prompt_ids, dtype=np.int64), np.fromiter(counts, np.int64, len(counts))
            ids = torch.from_numpy(np.concatenate(seen)).to(line.device)
            values = line[ids]
            line[ids] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
        if penalised:
            ids, times = (torch.tensor([*items], device=line.device) for items in (counts.keys(), counts.values()))
            line[ids] -= params.frequency_penalty * times + params.presence_penalty
        if params.logit_bias:
            ids, bias = (torch.tensor([*items], device=line.device)
                         for items in (params.logit_bias.keys(), params.logit_bias.values()))
            line[ids] += bias
        if row.banned:
            line[torch.tensor([*row.banned], device=line.device)] = -torch.inf
    if any(row.mask is not None for row in rows):
        return _forbidden(rows, logits.shape[-1], logits.device).add_(adjusted)
    return adjusted


def _forbidden(rows: Ordered[SampleRow], vocab: int, device: torch.device) -> Tensor:
    """-inf for what the rows' masks leave out, 0 for the rest: [rows, vocab], float32.

    The masks travel to the device as bits, and each byte is looked up there: adding is several times as fast as
    filling by a mask.
    """
    packed = np.full((len(rows), -(-vocab // 8)), 255, dtype=np.uint8)
    for line, row in zip(packed, rows):
        if row.mask is not None:
            line[:] = 0  # a model may have rows of logits for which its tokenizer has no id
            line[:len(row.mask)] = row.mask[:len(line)]
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1  # [bytes' values, 8]
    table = torch.zeros(256, 8, device=device).masked_fill(bits == 0, -torch.inf)
    places = torch.from_numpy(packed).to(device).int().flatten()
    return table.index_select(0, places).view(len(rows), -1)[:, :vocab]  # [rows * bytes, 8] -> [rows, vocab]


def uniform(seed: int, index: int, position: int) -> float:
    """The number in [0, 1) that decides a draw: counter-based, so that it needs no state (Philox,
    doi:10.1145/2063384.2063405)."""
    key = np.array([seed, index], dtype=np.uint64)
    return (int(np.random.Philox(key=key, counter=position).random_raw()) >> 11) * 2.0**-53


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _draw_from_all(probabilities: Tensor, rows: Ordered[SampleRow]) -> Tensor:
    """Inverse transform over the whole vocabulary, in the order of the ids: [rows, vocab] -> [rows]."""
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    return _invert(cumulative, cumulative[:, -1:], rows)


def _draw_from_likeliest(probabilities: Tensor, rows: Ordered[SampleRow]) -> Tensor:
    """Inverse transform over the likeliest tokens, best first: [rows, vocab] -> [rows].

    Sorted so, top-k, top-p and min-p each keep a beginning; together they keep the shortest.
    """
    vocab = probabilities.shape[-1]
    best, best_ids = probabilities.topk(min(NUM_CANDIDATES, vocab))
    kept = _num_kept(best, rows)
    ids = best_ids.gather(1, _invert_kept(best, kept, rows))[:, 0]
    short = [place for place, (count, row) in enumerate(zip(kept.tolist(), rows))
             if best.shape[-1] < vocab and row.params.top_k != best.shape[-1]
             and (count == best.shape[-1] or row.params.top_k > best.shape[-1])]
    for place in short:  # a flat row: its candidates go on past the first NUM_CANDIDATES
        best, best_ids = probabilities[place:place + 1].sort(dim=-1, descending=True, stable=True)
        row = [rows[place]]
        ids[place] = best_ids[0, _invert_kept(best, _num_kept(best, row), row)[0, 0]]
    return ids


def _num_kept(best: Tensor, rows: Ordered[SampleRow]) -> Tensor:
    """How many of each row's sorted candidates may be drawn, at least one: [rows, candidates] -> [rows]."""
    num_candidates, device = best.shape[-1], best.device
    top_k = _column([min(row.params.top_k, num_candidates) if row.params.top_k > 0 else num_candidates
                     for row in rows], device).long()
    top_p, min_p = (_column([getattr(row.params, name) for row in rows], device) for name in ("top_p", "min_p"))
    cumulative = best.cumsum(dim=-1, dtype=torch.float64)
    # The nucleus is that of the distribution which top-k left; without top-k, of the whole one.
    limited = _column([float(row.params.top_k > 0) for row in rows], device).bool()
    total = torch.where(limited, cumulative.gather(1, top_k - 1), 1.0)
    in_nucleus = ((cumulative - best) < top_p * total).sum(dim=-1)
    likely = (best >= min_p * best[:, :1]).sum(dim=-1)
    # top_p of 1 keeps all, whatever rounding made of the sum.
    in_nucleus = torch.where(top_p[:, 0] < 1, in_nucleus, num_candidates)
    return torch.minimum(torch.minimum(top_k[:, 0], in_nucleus), likely).clamp(min=1)


def _invert_kept(best: Tensor, kept: Tensor, rows: Ordered[SampleRow]) -> Tensor:
    """Which candidate each row draws among its first `kept`: [rows, 1]."""
    cumulative = best.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative.gather(1, kept[:, None] - 1)
    drawn = _invert(cumulative, total, rows)[:, None]
    return torch.minimum(drawn, kept[:, None] - 1)


def _invert(cumulative: Tensor, total: Tensor, rows: Ordered[SampleRow]) -> Tensor:
    """The first place whose cumulative sum exceeds the row's uniform share of `total`: [rows]."""
    uniforms = torch.tensor([[uniform(row.seed, row.index, row.position)] for row in rows], dtype=torch.float64,
                            device=cumulative.device)
    places = torch.searchsorted(cumulative, uniforms * total, right=True)[:, 0]
    return places.clamp(max=cumulative.shape[-1] - 1)


def _column(values: list[float], device: torch.device) -> Tensor:
    """[rows, 1], float32."""
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None]
