"""The tap that carries out plans: for each sequence of a step that has one, at its own tokens and no others."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llama.model.cache import KVCache
from llama.model.pattern import attention_scores, check_pattern, mix
from llama.model.plan import BoundEdit, BoundPlan
from llama.model.positions import Where
from llama.model.ragged import Segment
from llama.model.selectors import Place
from llama.model.tap import UNTOUCHED, Tap

# Rows of logits that are computed at once only to be looked at.
_ROWS = 128


class Captured(NamedTuple):
    """What one capture brought in one step: [positions, ...], a copy."""

    label: str
    positions: tuple[int, ...]
    value: Tensor


@dataclass
class Part:
    """One sequence's share of a step: its plan, its segment, and which of its tokens are where.

    rows: of the values that the tap is given, for each of `positions`, both rising. captured: filled as they pass.
    place: [1], int64, the row of a part with one token, where that is read from the device: a captured graph is given
    another at each replay, and what is done a second time makes no tensor on the host.
    """

    plan: BoundPlan
    segment: Segment
    rows: Sequence[int]
    positions: Sequence[int]
    captured: list[Captured] = field(default_factory=list)
    place: Tensor | None = None
    _selected: dict[Where, tuple[Tensor, list[int]]] = field(default_factory=dict)
    _needed: dict[tuple[str, ...], tuple[Tensor, "Part"]] = field(default_factory=dict)
    _vectors: dict[int, Tensor] = field(default_factory=dict)

    def select(self, where: Where, device: torch.device) -> tuple[Tensor, list[int]]:
        """The rows [n], int64, and the positions that are meant, of those that are here."""
        if where not in self._selected:
            chosen = [(row, position) for row, position in zip(self.rows, self.positions) if position in where]
            rows = self._there([row for row, _ in chosen], device)
            self._selected[where] = rows, [position for _, position in chosen]
        return self._selected[where]

    def vector(self, one: BoundEdit, device: torch.device) -> Tensor | None:
        """The edit's, if it has one."""
        vector = getattr(one.edit, "vector", None)
        if vector is not None and one.number not in self._vectors:
            self._vectors[one.number] = torch.as_tensor(vector, device=device)
        return self._vectors.get(one.number)

    def _there(self, rows: list[int], device: torch.device) -> Tensor:
        is_given = self.place is not None and rows
        return self.place if is_given else torch.tensor(rows, dtype=torch.int64, device=device)

    def among(self, rows: Sequence[int]) -> "Part":
        """The same for values that exist for these rows only."""
        here = {row: position for row, position in zip(self.rows, self.positions)}
        kept = [(place, here[row]) for place, row in enumerate(rows) if row in here]
        return replace(self, rows=[place for place, _ in kept], positions=[position for _, position in kept],
                       place=None, _selected={}, _needed={})

    def touch(self, name: str, value: Tensor) -> Tensor:
        """The value with the edits that the plan has for this site; then what it captures there is copied."""
        edits, captures = self.plan.at.get(name, ((), ()))
        for one in edits:
            rows, positions = self.select(one.where, value.device)
            if positions:
                value = _edited(value, one, self.vector(one, value.device), rows, positions)
        for one in captures:
            rows, positions = self.select(one.where, value.device)
            if positions:
                self.captured.append(Captured(one.place.label, tuple(positions), _picked(value, one.place, rows)))
        return value

    def needed(self, *names: str, device: torch.device) -> tuple[Tensor, "Part"]:
        """The rows that the plan looks at or edits at any of these sites, and the part for values of these alone."""
        if names not in self._needed:
            wheres = {one.where for name in names for group in self.plan.at.get(name, ()) for one in group}
            rows = [row for row, position in zip(self.rows, self.positions) if any(position in where for where in wheres)]
            self._needed[names] = self._there(rows, device), self.among(rows)
        return self._needed[names]

    def edits(self, *names: str) -> bool:
        """Whether the plan changes anything at one of these sites."""
        return any(self.plan.at.get(name, ((), ()))[0] for name in names)


class PlanTap(Tap):
    """A step's plans.

    parts: one for each sequence that has a plan. cache: what the model is run on, if anything. read_out: the model's
    final norm and head, [rows, hidden] -> [rows, vocab].
    """

    def __init__(self, parts: Sequence[Part], cache: KVCache | None, read_out: Callable[[Tensor], Tensor],
                 layer: int | None = None):
        self.parts = parts
        self._cache = cache
        self._read_out = read_out
        self._layer = layer
        self._prefix = "" if layer is None else f"layers.{layer}."

    def layer(self, layer: int) -> Tap:
        """The tap for the sites of one layer; one that does nothing, where there is nothing to do."""
        parts = [part for part in self.parts if layer in part.plan.layers]
        return PlanTap(parts, self._cache, self._read_out, layer) if parts else UNTOUCHED

    def rows(self, rows: Tensor | range) -> Tap:
        """The tap for values that exist for these tokens of the step only."""
        chosen = rows if isinstance(rows, range) else rows.tolist()
        return PlanTap([part.among(chosen) for part in self.parts], self._cache, self._read_out)

    def __call__(self, site: str, value: Tensor, *made_from: Any) -> Tensor:
        """What each plan makes of the value; what is recomputed at this place comes before it, what is read after."""
        for part in self.parts:
            if site == "attn.heads":
                value = self._attention(part, value, *made_from)
            elif site == "attn_out":
                value = self._head_out(part, value, *made_from)
            value = part.touch(self._prefix + site, value)
            if site == "resid_post":
                self._lens(part, value)
        return value

    def _attention(self, part: Part, heads: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Scores and pattern of the rows asked for. If one is edited, what these heads put out follows from it."""
        names = self._prefix + "attn.scores", self._prefix + "attn.pattern"
        rows, here = part.needed(*names, device=heads.device)
        if len(rows) == 0:
            return heads
        keys, values = self._context(part, k, v)
        positions = torch.tensor(here.positions, device=heads.device)
        scores = attention_scores(q[rows], keys, positions)  # [rows, num_heads, context]
        check_pattern(scores.softmax(dim=-1), values, heads[rows], names[1])
        scores = here.touch(names[0], scores)
        pattern = here.touch(names[1], scores.softmax(dim=-1))
        return heads.index_copy(0, rows, mix(pattern, values).to(heads.dtype)) if part.edits(*names) else heads

    def _head_out(self, part: Part, attn_out: Tensor, heads: Tensor, project: Any) -> Tensor:
        """What each head alone adds. If that is edited, the rows of attn_out are the sum of their heads."""
        name = self._prefix + "attn.head_out"
        rows, here = part.needed(name, device=heads.device)
        if len(rows) == 0:
            return attn_out
        num_heads = heads.shape[1]
        alone = heads[rows, None] * torch.eye(num_heads, dtype=heads.dtype, device=heads.device)[..., None]
        outs = project(alone.flatten(0, 1).flatten(1)).unflatten(0, (-1, num_heads))  # [rows, num_heads, hidden]
        outs = here.touch(name, outs)
        return attn_out.index_copy(0, rows, outs.sum(dim=1)) if part.edits(name) else attn_out

    def _lens(self, part: Part, resid_post: Tensor) -> None:
        """What this layer would have said, of the rows asked for; some at a time, for a vocabulary is wide."""
        name = self._prefix + "lens"
        rows, here = part.needed(name, device=resid_post.device)
        for first in range(0, len(rows), _ROWS):
            some = rows[first:first + _ROWS]
            logprobs = self._read_out(resid_post[some]).log_softmax(dim=-1)  # [some, vocab]
            of_some = here if len(some) == len(rows) else here.among(range(first, first + len(some)))
            of_some.touch(name, logprobs)

    def _context(self, part: Part, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values that the sequence has by now: two of [context, num_kv_heads, head_dim]."""
        if self._cache is None:
            rows = slice(part.rows[0], part.rows[-1] + 1)
            return k[rows], v[rows]
        read = [self._cache.read(self._layer, run) for run in part.segment.runs]
        return torch.cat([keys for keys, _ in read]), torch.cat([values for _, values in read])


def _picked(value: Tensor, place: Place, rows: Tensor) -> Tensor:
    """A copy of what is captured of these rows."""
    chosen = value[(rows, *place.index)]
    if place.top is None:
        return chosen
    largest, ids = chosen.topk(place.top, dim=-1)
    return torch.stack((ids.to(largest.dtype), largest), dim=-1)  # [rows, top, 2]; float32 has every id exactly


def _edited(value: Tensor, one: BoundEdit, vector: Tensor | None, rows: Tensor, positions: Sequence[int]) -> Tensor:
    """A copy in which one edit is made, computed in float32."""
    index = (rows, *one.place.index)
    if vector is not None and vector.dim() == value[index].dim() and vector.dim() > 0:  # a row for each position named
        vector = vector[[one.where.exact.index(position) for position in positions]]
    value = value.clone()
    value[index] = one.edit.apply(value[index].float(), vector).to(value.dtype)
    return value
