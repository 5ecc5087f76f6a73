"""Logits to ids and log probabilities: all rows at once, each by its own parameters.

What one row draws depends on its own logits, parameters and (seed, index, position) alone, never on its
company: a seed means the same by itself, in any batch, and after a preemption.
"""

from collections.abc import Callable, Mapping, Sequence as Ordered
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llama.engine.request import SamplingParams, TokenLogprob
from llama.engine.scores import Scores, log_probabilities, read, score
from llama.engine.upload import upload

# The likeliest tokens nearly always hold the nucleus; only a row that they do not suffice is sorted whole.
NUM_CANDIDATES = 1024

# Probabilities are added up as integers, in units so small: such sums are the same in whatever order a device adds.
UNITS = 2.0**60

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
    """Draw one token a row, and wait for them. logits: [rows, vocab], float32, left as they are."""
    drawn = draw(logits, rows)
    return drawn.tokens(read(drawn.parts))


def draw(logits: Tensor, rows: Ordered[SampleRow]) -> "Draw":
    """Begin to draw one token a row: everything is enqueued where the logits are, and nothing waited for.

    logits: [rows, vocab], float32, left as they are; what is enqueued later may overwrite them.
    """
    adjusted = adjust(logits, rows)
    ids, flat = adjusted.argmax(dim=-1), None
    for way in (_draw_from_all, _draw_from_likeliest, _draw_from_sorted):
        places = [place for place, row in enumerate(rows) if _way(row.params) is way]
        if not places:
            continue
        chosen = [rows[place] for place in places]
        chances = _chances(adjusted, places, chosen)
        drawn, num_kept = way(chances)
        ids.index_copy_(0, chances.places, drawn)
        without_limit = any(row.params.top_k <= 0 for row in chosen)
        if way is _draw_from_likeliest and without_limit and logits.shape[-1] > NUM_CANDIDATES:
            unsure = (num_kept == NUM_CANDIDATES) & (chances.top_k == 0)
            scored = any(row.params.logprobs is not None for row in chosen)
            flat = _Flat(unsure[:, 0], places, chances, logits[chances.places] if scored else None)
    wanted = [row.params.logprobs for row in rows]
    return Draw(ids, score(logits, ids, wanted), flat, wanted)


@dataclass(frozen=True)
class Draw:
    """Tokens that are being drawn on the device.

    ids: [rows], int64, there: the next step may begin with them before the host has seen them.

    Of a row that is flatter than its candidates the host alone finds out, and draws it again: then this draw is
    `amended`, its `ids` are not what was drawn, and what has begun with them is to be dropped.
    """

    ids: Tensor
    scores: Scores
    flat: "_Flat | None"
    wanted: Ordered[int | None]

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Small tensors on the device, of which the host needs a copy to know the `tokens`; the first are the ids."""
        return self.scores.parts if self.flat is None else (*self.scores.parts, self.flat.unsure)

    def amended(self, parts: Ordered[Tensor]) -> bool:
        """Whether `tokens` draws a row again. parts: copies of this draw's on the CPU."""
        return self.flat is not None and bool(parts[-1].any())

    def tokens(self, parts: Ordered[Tensor]) -> list[TokenLogprob]:
        """What was drawn, a token a row. parts: copies of this draw's on the CPU."""
        tokens = self.scores.tokens(parts[:len(self.scores.parts)])
        lines = np.flatnonzero(parts[-1]).tolist() if self.amended(parts) else ()
        for line in lines:
            place = self.flat.places[line]
            tokens[place] = self.flat.draw_again(line, self.wanted[place])
        return tokens


def adjust(logits: Tensor, rows: Ordered[SampleRow]) -> Tensor:
    """Penalties, biases, bans and masks: [rows, vocab]; the input itself where no row asks for any."""
    vocab, adjusted = logits.shape[-1], logits
    changes = repeated, lowered, raised, banned = [], [], [], []  # each: cells of the flat logits, and numbers for them
    for place, row in enumerate(rows):
        params, counts, first = row.params, row.counts or {}, place * vocab
        repetition = params.repetition_penalty not in (None, 1)
        penalised = counts and (params.frequency_penalty or params.presence_penalty)
        generated = np.fromiter(counts if repetition or penalised else (), np.int64)
        if repetition:
            seen = np.asarray(row.prompt_ids, dtype=np.int64), generated
            repeated.append((first + np.concatenate(seen), params.repetition_penalty))
        if penalised:
            times = np.fromiter(counts.values(), np.float32)
            lowered.append((first + generated, -(params.frequency_penalty * times + params.presence_penalty)))
        if params.logit_bias:
            raised.append((first + np.array([*params.logit_bias]), [*params.logit_bias.values()]))
        if row.banned:
            banned.append((first + np.array([*row.banned]), -np.inf))
    asked = [change for change in changes if change]
    if asked:
        adjusted = logits.clone(memory_format=torch.contiguous_format)
        flat = adjusted.view(-1)  # a view: the rows one after another
        there = upload(logits.device, *(array for change in asked for array in _joined(change)))
        for change, cells, numbers in zip(asked, there[0::2], there[1::2]):
            before = flat[cells]
            flat[cells] = before + numbers if change is not repeated else \
                torch.where(before > 0, before / numbers, before * numbers)
    if any(row.mask is not None for row in rows):
        return _forbidden(rows, logits.shape[-1], logits.device).add_(adjusted)
    return adjusted


def _joined(change: list[tuple[np.ndarray, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """All rows' cells, int64, and a number for each, float32."""
    numbers = [np.broadcast_to(np.asarray(numbers, np.float32), cells.shape) for cells, numbers in change]
    return np.concatenate([cells for cells, _ in change]), np.concatenate(numbers)


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
    places = upload(device, packed)[0].int().flatten()
    return table.index_select(0, places).view(len(rows), -1)[:, :vocab]  # [rows * bytes, 8] -> [rows, vocab]


def uniform(seed: int, index: int, position: int) -> float:
    """The number in [0, 1) that decides a draw: counter-based, so that it needs no state (Philox,
    doi:10.1145/2063384.2063405)."""
    key = np.array([seed, index], dtype=np.uint64)
    return (int(np.random.Philox(key=key, counter=position).random_raw()) >> 11) * 2.0**-53


class _Chances(NamedTuple):
    """What decides the draws of some rows, on the device.

    places: [rows], int64: which they are. probabilities: [rows, vocab], float32, each at its own temperature. The others:
    [rows, 1]; uniform is float64, top_k int64 and 0 where all may be drawn.
    """

    places: Tensor
    probabilities: Tensor
    uniform: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    def row(self, line: int) -> "_Chances":
        """Those of one row."""
        return _Chances(*(each[line:line + 1] for each in self))


def _chances(adjusted: Tensor, places: list[int], rows: Ordered[SampleRow]) -> _Chances:
    """Those of the rows in these places of `adjusted`. However low a temperature is, its probabilities are finite."""
    vocab = adjusted.shape[-1]
    params = [row.params for row in rows]
    columns = (np.array([max(one.temperature, LOWEST_TEMPERATURE) for one in params], np.float32),
               np.array([uniform(row.seed, row.index, row.position) for row in rows]),
               np.array([min(max(one.top_k, 0), vocab) for one in params]),
               np.array([one.top_p for one in params], np.float32), np.array([one.min_p for one in params], np.float32))
    there, temperature, *others = upload(adjusted.device, np.array(places), *(column[:, None] for column in columns))
    logits = adjusted if len(places) == len(adjusted) else adjusted[there]
    probabilities = torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1)
    return _Chances(there, probabilities, *others)


@dataclass(frozen=True)
class _Flat:
    """What is kept of rows that may be flatter than their candidates, until the host knows.

    unsure: [rows], bool, whether one is. logits: raw, [rows, vocab], if a row wants its token's log probability.
    """

    unsure: Tensor
    places: list[int]
    chances: _Chances
    logits: Tensor | None

    def draw_again(self, line: int, wanted: int | None) -> TokenLogprob:
        """The token of one row, from its whole vocabulary."""
        (token_id,), _ = _draw_from_sorted(self.chances.row(line))
        raw = self.chances.probabilities if self.logits is None else self.logits
        return log_probabilities(raw[line:line + 1], [int(token_id)], [wanted])[0]


def _way(params: SamplingParams) -> "Callable[[_Chances], tuple[Tensor, Tensor | None]] | None":
    """How a row's token is drawn, if not by taking the likeliest."""
    if params.temperature == 0:
        return None
    if params.top_k <= 0 and params.top_p >= 1 and params.min_p <= 0:
        return _draw_from_all
    return _draw_from_sorted if params.top_k > NUM_CANDIDATES else _draw_from_likeliest


def _draw_from_all(chances: _Chances) -> tuple[Tensor, None]:
    """Inverse transform over the whole vocabulary, in the order of the ids: ids [rows]."""
    cumulative = _running_sums(chances.probabilities)
    return _invert(cumulative, cumulative[:, -1:], chances.uniform), None


def _draw_from_likeliest(chances: _Chances) -> tuple[Tensor, Tensor]:
    """Inverse transform over the likeliest tokens: ids [rows], and how many were in question [rows, 1]."""
    bits = chances.probabilities.view(torch.int32)  # of numbers that are not negative, in the same order
    vocab = bits.shape[-1]
    # Of equals the lowest id comes first, as in a stable sort: which of them is taken must not hang on the algorithm, that
    # is, on the number of rows.
    ranks = torch.sub(torch.arange(vocab, device=bits.device), bits, alpha=1 << 32)
    best_ids = ranks.topk(min(NUM_CANDIDATES, vocab), largest=False).indices
    return _draw_from_best(chances.probabilities.gather(1, best_ids), best_ids, chances)


def _draw_from_sorted(chances: _Chances) -> tuple[Tensor, Tensor]:
    """The same with all tokens as candidates."""
    return _draw_from_best(*chances.probabilities.sort(dim=-1, descending=True, stable=True), chances)


def _draw_from_best(best: Tensor, best_ids: Tensor, chances: _Chances) -> tuple[Tensor, Tensor]:
    """Inverse transform over candidates, best first: each [rows, candidates] -> ids [rows], and how many of the
    candidates were in question [rows, 1].

    Sorted so, top-k, top-p and min-p each keep a beginning; together they keep the shortest, at least one.
    """
    num_candidates = best.shape[-1]
    cumulative = _running_sums(best)
    is_limited = chances.top_k > 0
    top_k = torch.where(is_limited, chances.top_k, num_candidates).clamp(max=num_candidates)
    # The nucleus is that of the distribution which top-k left; without top-k, of the whole one.
    total = torch.where(is_limited, cumulative.gather(1, top_k - 1).double(), UNITS)
    before = cumulative - _in_units(best)
    in_nucleus = (before < chances.top_p * total).sum(dim=-1, keepdim=True)
    # top_p of 1 keeps all, whatever rounding made of the sum.
    in_nucleus = torch.where(chances.top_p < 1, in_nucleus, num_candidates)
    likely = (best >= chances.min_p * best[:, :1]).sum(dim=-1, keepdim=True)
    num_kept = torch.minimum(torch.minimum(top_k, in_nucleus), likely).clamp(min=1)
    drawn = _invert(cumulative, cumulative.gather(1, num_kept - 1), chances.uniform)[:, None]
    return best_ids.gather(1, torch.minimum(drawn, num_kept - 1))[:, 0], num_kept


def _invert(cumulative: Tensor, total: Tensor, uniforms: Tensor) -> Tensor:
    """The first place whose cumulative sum exceeds the row's uniform share of `total`: [rows]."""
    places = torch.searchsorted(cumulative, (uniforms * total).long(), right=True)[:, 0]
    return places.clamp(max=cumulative.shape[-1] - 1)


def _running_sums(probabilities: Tensor) -> Tensor:
    """From the first on, in UNITS: int64."""
    return _in_units(probabilities).cumsum(dim=-1)


def _in_units(probabilities: Tensor) -> Tensor:
    return (probabilities * UNITS).long()
