"""From a request's trace events to whole arrays; no torch, so that a server's front can do it too."""

from collections.abc import Iterable

import numpy as np

from llama.engine.request import TraceEvent
from llama.model.plan import BoundPlan
from llama.model.selectors import Place


class TraceError(RuntimeError):
    """A run that did not bring what its plan asked for; the message names the capture or the edit."""


def assembled(events: Iterable[TraceEvent], bound: BoundPlan, num_computed: int
              ) -> tuple[dict[str, np.ndarray], dict[str, tuple[int, ...]]]:
    """Values [positions, ...] and positions of a finished run, by name. num_computed: positions whose values count.

    Raises TraceError for an edit that never fired and a capture that never came.
    """
    for one in bound.unfired(num_computed):
        raise TraceError(f"edits[{one.number}], {type(one.edit).__name__} at {one.place.label}, never fired: only "
                         f"{num_computed} positions were computed")
    rows: dict[str, dict[int, np.ndarray]] = {capture.place.label: {} for capture in bound.captures}
    for event in events:
        for position, value in zip(event.positions, event.values):
            if position < num_computed:
                rows[event.site][position] = value
    for name, found in rows.items():
        if not found:
            raise TraceError(f"{name} was never captured: only {num_computed} positions were computed")
    positions = {name: tuple(sorted(found)) for name, found in rows.items()}
    return {one.place.label: _stacked(rows[one.place.label], one.place) for one in bound.captures}, positions


def _stacked(rows: dict[int, np.ndarray], place: Place) -> np.ndarray:
    """Rows in order, contexts filled up to the longest."""
    ordered = [rows[position] for position in sorted(rows)]
    if place.site.is_attention and place.key is None:
        width = max(row.shape[-1] for row in ordered)
        fill = -np.inf if place.site.name == "attn.scores" else 0.0
        ordered = [np.concatenate((row, np.full((*row.shape[:-1], width - row.shape[-1]), fill, np.float32)), axis=-1)
                   for row in ordered]
    return np.stack(ordered)
