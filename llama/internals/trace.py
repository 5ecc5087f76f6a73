"""A run looked at: what a plan captured, by name, with the tokens beside it.

    trace = llm.trace("What is 17 + 25?", capture=["layers.*.resid_post", "layers.3.attn.pattern[head=2]"])
    trace["layers.3.attn.pattern[head=2]"]       # [positions, context]
    trace.stack("layers.*.resid_post")           # [layers, positions, hidden]
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from llama.config import LlamaConfig
from llama.engine.request import TraceEvent
from llama.internals.assemble import TraceError, assembled
from llama.model.edits import Add, Edit, Replace, Scale, Zero
from llama.model.plan import BoundPlan, Capture, TracePlan
from llama.model.positions import PlanError, Positions, checked, locate
from llama.model.selectors import changeable_places

__all__ = ["Add", "Capture", "Patch", "PlanError", "Replace", "Scale", "Trace", "TraceError", "TracePlan", "Zero",
           "expanded"]


@dataclass(frozen=True, eq=False)
class Trace:
    """What one run captured.

    ids, tokens: of prompt and continuation, as numbers and as text. num_prompt: how many are the prompt's. values: by
    name, [positions, ...] in float32; scores and patterns are filled up to the longest context, with -inf and 0.
    positions: of the rows, by name, rising. text: the continuation.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    num_prompt: int
    values: dict[str, Tensor]
    positions: dict[str, tuple[int, ...]]
    plan: TracePlan
    text: str = ""

    def __getitem__(self, name: str) -> Tensor:
        """What was captured under this name. Raises TraceError, with the names there are."""
        if name not in self.values:
            names = list(self.values)
            listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            raise TraceError(f"{name!r} was not captured; there are {listed or 'no captures'}")
        return self.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def names(self, pattern: str) -> list[str]:
        """Names that a pattern with * matches, in the order of the computation. Raises TraceError if there is none."""
        names = [name for name in self.values if name == pattern or fnmatchcase(name, pattern.replace("[", "[[]"))]
        if not names:
            self[pattern]  # says what there is
        return names

    def stack(self, pattern: str) -> Tensor:
        """All that a pattern matches, one above the other: [names, positions, ...]. Raises TraceError."""
        names = self.names(pattern)
        if len({(self.positions[name], self.values[name].shape) for name in names}) > 1:
            raise TraceError(f"{pattern!r} matches values of different shapes or positions: {', '.join(names[:8])}")
        return torch.stack([self.values[name] for name in names])

    def at(self, name: str, position: int) -> Tensor:
        """One position's value; a negative position counts from the prompt's end. Raises TraceError."""
        position += self.num_prompt if position < 0 else 0
        if position not in self.positions.get(name, (position,)):
            raise TraceError(f"{name} was not captured at position {position}, only at {list(self.positions[name])}")
        return self[name][self.positions[name].index(position)]


def assemble(events: Iterable[TraceEvent], bound: BoundPlan, num_computed: int
             ) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """`llama.internals.assemble.assembled`, as tensors. Raises TraceError."""
    arrays, positions = assembled(events, bound, num_computed)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, positions


@dataclass(frozen=True, eq=False)
class Patch:
    """Values of another run in place of this one's: wherever `site` matches what that run captured.

    positions: of this run; None for all of the prompt's that the other one has. from_positions: of the other run, one
    for each; None for the same ones.
    """

    site: str
    from_run: Trace
    positions: Positions = None
    from_positions: Positions = None

    def replacements(self, config: LlamaConfig, num_prompt: int, field: str) -> list[Replace]:
        """The same as Replace edits, which hold the values themselves. Raises PlanError."""
        source, found = self.from_run, []
        for place in changeable_places(self.site, config, f"{field}.site"):
            whole = place.label if place.label in source.values else place.name
            if whole not in source.values:
                continue
            here, there = self._positions(whole, num_prompt, field)
            rows = torch.stack([source.at(whole, position) for position in there])
            if whole != place.label:
                rows = rows[(slice(None), *place.index)]
            found.append(Replace(place.label, rows, here))
        if not found:
            raise PlanError(f"{field}.site", f"the other run captured nothing that {self.site!r} matches; it has "
                            f"{', '.join(list(source.values)[:8]) or 'no captures'}")
        return found

    def _positions(self, name: str, num_prompt: int, field: str) -> tuple[list[int], list[int]]:
        captured = self.from_run.positions[name]
        if self.positions is None:
            here = [position for position in captured if position < num_prompt]
        else:
            where = locate(checked(self.positions, f"{field}.positions"), num_prompt, num_prompt, f"{field}.positions")
            here = list(where.exact or where.within(0, num_prompt))
        there = here
        if self.from_positions is not None:
            where = locate(checked(self.from_positions, f"{field}.from_positions"), self.from_run.num_prompt,
                           len(self.from_run.ids), f"{field}.from_positions")
            there = list(where.exact or where.within(0, self.from_run.num_prompt))
        if len(there) != len(here):
            raise PlanError(field, f"{len(here)} positions are to be patched from {len(there)}")
        if missing := set(there) - set(captured):
            raise PlanError(field, f"the other run has {name} at positions {list(captured)}, not at {min(missing)}")
        return here, there


def expanded(edits: Sequence[Edit | Patch], config: LlamaConfig, num_prompt: int) -> tuple[Edit, ...]:
    """Edits in which each Patch has become what it replaces. Raises PlanError."""
    plain: list[Edit] = []
    for number, edit in enumerate(edits):
        plain += edit.replacements(config, num_prompt, f"edits[{number}]") if isinstance(edit, Patch) else [edit]
    return tuple(plain)
