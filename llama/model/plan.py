"""A trace plan: which values to capture and which to change, as data that can be written down and sent. No torch.

    TracePlan   as it is asked: patterns of sites, positions that may count from the prompt's end
    BoundPlan   the same for one model and one prompt: every place by name, every position by number, all checked
"""

import hashlib
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from llama.config import LlamaConfig
from llama.model.edits import Edit, checked_edit, edit_from_json, edit_to_json
from llama.model.positions import PlanError, Positions, Where, as_json, checked, locate
from llama.model.selectors import Place, changeable_places, places
from llama.model.sites import LAST

MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Capture:
    """A pattern of sites, with positions of its own; None for those of the plan."""

    site: str
    positions: Positions = None


@dataclass(frozen=True, eq=False)
class TracePlan:
    """What to capture and what to change.

    capture: patterns of sites (`llama.model.selectors`). positions: at which tokens, where a capture does not say
    itself; None for all. edits: applied in their order, before anything is captured at the same place. max_bytes: what
    all captures together may take. Raises PlanError.
    """

    capture: tuple[str | Capture, ...] = ()
    positions: Positions = None
    edits: tuple[Edit, ...] = ()
    max_bytes: int = MAX_BYTES

    def __post_init__(self) -> None:
        wanted = [self.capture] if isinstance(self.capture, str | Capture) else self.capture
        captures = tuple(Capture(one) if isinstance(one, str) else one for one in wanted)
        for number, one in enumerate(captures):
            if not isinstance(one, Capture):
                raise PlanError(f"capture[{number}]", f"a capture is a site's name or pattern, not {one!r}")
        set_field = object.__setattr__  # the dataclass is frozen for everyone else
        set_field(self, "positions", checked(self.positions, "positions"))
        set_field(self, "capture", tuple(Capture(one.site, checked(one.positions, f"capture[{number}].positions"))
                                         for number, one in enumerate(captures)))
        edits = (checked_edit(edit, f"edits[{number}]") for number, edit in enumerate(self.edits))
        set_field(self, "edits", tuple(edits))
        if isinstance(self.max_bytes, bool) or not isinstance(self.max_bytes, int) or self.max_bytes < 0:
            raise PlanError("max_bytes", f"{self.max_bytes!r} is no number of bytes")

    def to_json(self) -> dict[str, Any]:
        """The plan as an object of JSON."""
        captures = [one.site if one.positions is None else {"site": one.site, "positions": as_json(one.positions)}
                    for one in self.capture]
        return {"capture": captures, "positions": as_json(self.positions),
                "edits": [edit_to_json(edit) for edit in self.edits], "max_bytes": self.max_bytes}

    @classmethod
    def from_json(cls, raw: Any) -> "TracePlan":
        """The plan in an object of JSON. Raises PlanError, which names the field."""
        if not isinstance(raw, dict):
            raise PlanError("plan", "a plan is an object with capture, positions, edits and max_bytes")
        if unknown := raw.keys() - {"capture", "positions", "edits", "max_bytes"}:
            raise PlanError(sorted(unknown)[0], "a plan has no such field; it has capture, positions, edits, max_bytes")
        capture, edits = raw.get("capture", []), raw.get("edits", [])
        for name, value in (("capture", capture), ("edits", edits)):
            if not isinstance(value, list):
                raise PlanError(name, f"{name} is a list, not {value!r}")
        return cls(tuple(_capture_from_json(one, f"capture[{number}]") for number, one in enumerate(capture)),
                   raw.get("positions"),
                   tuple(edit_from_json(edit, f"edits[{number}]") for number, edit in enumerate(edits)),
                   raw.get("max_bytes", MAX_BYTES))

    def bind(self, config: LlamaConfig, num_prompt: int, most: int) -> "BoundPlan":
        """The plan for a model and a prompt of so many tokens, where at most `most` positions are computed.

        Raises PlanError for a site that matches nothing, a position that is never computed, a vector of the wrong
        shape, captures that take more than max_bytes.
        """
        captures: dict[str, BoundCapture] = {}
        needed = 0
        for number, one in enumerate(self.capture):
            field = f"capture[{number}]"
            positions = self.positions if one.positions is None else one.positions
            where = locate(positions, num_prompt, most, f"{field}.positions")
            for place in places(one.site, config, field):
                if captures.setdefault(place.label, BoundCapture(place, where)).where != where:
                    raise PlanError(field, f"{place.label} is captured twice, at other positions")
            needed = sum(_num_bytes(each, config, most) for each in captures.values())
            if needed > self.max_bytes:
                raise PlanError(field, f"with {one.site!r} the captures take {needed:,} bytes, and max_bytes is "
                                f"{self.max_bytes:,}; name fewer sites or positions, lower max_tokens, or raise it")
        edits = []
        for number, edit in enumerate(self.edits):
            field = f"edits[{number}]"
            where = locate(edit.positions, num_prompt, most, f"{field}.positions")
            for place in changeable_places(edit.site, config, f"{field}.site"):
                _check_vector(edit, place, where, config, f"{field}.vector")
                edits.append(BoundEdit(number, edit, place, where))
        return BoundPlan(tuple(captures.values()), tuple(edits))


class BoundCapture(NamedTuple):
    """One place to look at."""

    place: Place
    where: Where


class BoundEdit(NamedTuple):
    """One place to change. number: which of the plan's edits this is."""

    number: int
    edit: Edit
    place: Place
    where: Where


@dataclass(frozen=True, eq=False)
class BoundPlan:
    """What to do at which place of a model, for one sequence."""

    captures: tuple[BoundCapture, ...]
    edits: tuple[BoundEdit, ...]

    @cached_property
    def at(self) -> dict[str, tuple[list[BoundEdit], list[BoundCapture]]]:
        """By full name of the site: the edits there in their order, and the captures."""
        found: dict[str, tuple[list[BoundEdit], list[BoundCapture]]] = {}
        for edit in self.edits:
            found.setdefault(edit.place.name, ([], []))[0].append(edit)
        for capture in self.captures:
            found.setdefault(capture.place.name, ([], []))[1].append(capture)
        return found

    @cached_property
    def layers(self) -> frozenset[int | None]:
        """The layers in which there is something to do; None for what is in no layer."""
        return frozenset(one.place.layer for one in (*self.edits, *self.captures))

    @cached_property
    def first_captured(self) -> int | None:
        """The first position that must be computed, even if the cache has it; None if no capture needs one."""
        return min((capture.where.first for capture in self.captures), default=None)

    @cached_property
    def last_wanted(self) -> tuple[Where, ...]:
        """The tokens whose final norm and logits are wanted, whether or not one is drawn after them."""
        last = {site.name for site in LAST}
        return tuple(capture.where for capture in self.captures if capture.place.name in last)

    @cached_property
    def digest(self) -> str:
        """What tells these edits from others in the prefix cache; empty without any."""
        if not self.edits:
            return ""
        parts = [repr((one.place.label, one.where, edit_to_json(one.edit))) for one in self.edits]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def replayable(self, position: int) -> tuple[Hashable, ...] | None:
        """What is done at a position, named alike wherever the same is done, so that it can be captured once and replayed
        at others. None if it cannot: it is asked for single positions, or at a site as long as its context."""
        edits = [place for place, one in enumerate(self.edits) if position in one.where]
        captures = [one for one in self.captures if position in one.where]
        if any(one.where.exact is not None or one.place.site.is_attention
               for one in (*captures, *(self.edits[place] for place in edits))):
            return None
        return self.digest if edits else "", *edits, *(one.place.label for one in captures)

    def unfired(self, num_computed: int) -> list[BoundEdit]:
        """The edits none of whose positions is among the first `num_computed`."""
        return [one for one in self.edits if not one.where.within(0, num_computed)]


def _num_bytes(capture: BoundCapture, config: LlamaConfig, most: int) -> int:
    """What a capture takes in the end: float32, its context filled up to the longest."""
    size = 4 * capture.where.count(most)
    for axis in capture.place.shape(config):
        size *= most if axis is None else axis
    return size


def _check_vector(edit: Edit, place: Place, where: Where, config: LlamaConfig, field: str) -> None:
    vector, shape = getattr(edit, "vector", None), place.shape(config)
    if vector is None or vector.ndim == 0:
        return
    if None in shape:
        raise PlanError(field, f"{place.label} is as long as its context is: give one number, not a vector")
    if vector.shape != shape and (where.exact is None or vector.shape != (len(where.exact), *shape)):
        rows = "" if where.exact is None else f", or {[len(where.exact), *shape]}, a row for each position"
        raise PlanError(field, f"the vector's shape is {list(vector.shape)}; {place.label} takes one number, or "
                        f"{list(shape)}{rows}")


def _capture_from_json(raw: Any, field: str) -> Capture:
    if isinstance(raw, str):
        return Capture(raw)
    if not isinstance(raw, dict) or not isinstance(raw.get("site"), str) or not raw.keys() <= {"site", "positions"}:
        raise PlanError(field, "a capture is a site's name or pattern, or an object with site and positions")
    return Capture(raw["site"], checked(raw.get("positions"), f"{field}.positions"))
