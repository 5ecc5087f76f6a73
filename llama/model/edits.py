"""What a plan may do to a value on its way: five words of data, each with its arithmetic.

Arrays are kept as float32 numpy arrays, so that a plan can be compared, written as JSON and sent to another process; no
torch is imported here. A vector has the shape of one token's value at the site, or is one number for all of it, or has
one such row for each of the positions named.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from llama.model.positions import PlanError, Positions, as_json, checked

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, eq=False)
class Add:
    """value + scale * vector."""

    site: str
    vector: Any
    scale: float = 1.0
    positions: Positions = None

    def apply(self, value: Any, vector: Any) -> Any:
        """The new value, in the old one's dtype."""
        return value + self.scale * vector


@dataclass(frozen=True, eq=False)
class Replace:
    """The vector in the value's place."""

    site: str
    vector: Any
    positions: Positions = None

    def apply(self, value: Any, vector: Any) -> Any:
        """The new value."""
        return vector.expand_as(value)


@dataclass(frozen=True, eq=False)
class Zero:
    """Nothing in the value's place: ablation."""

    site: str
    positions: Positions = None

    def apply(self, value: Any, _: Any) -> Any:
        """The new value."""
        return value.new_zeros(()).expand_as(value)


@dataclass(frozen=True, eq=False)
class Scale:
    """factor * value."""

    site: str
    factor: float
    positions: Positions = None

    def apply(self, value: Any, _: Any) -> Any:
        """The new value, in the old one's dtype."""
        return value * self.factor


Edit = Add | Replace | Zero | Scale
_KINDS: dict[str, type] = {"add": Add, "replace": Replace, "zero": Zero, "scale": Scale}


def checked_edit(edit: Edit, field: str) -> Edit:
    """The same edit with its numbers made sure of. Raises PlanError."""
    kind = type(edit)
    if kind not in _KINDS.values():
        raise PlanError(field, f"an edit is one of Add, Replace, Zero, Scale and Patch, not {edit!r}")
    values = {part.name: getattr(edit, part.name) for part in fields(edit)}
    values["positions"] = checked(edit.positions, f"{field}.positions")
    for name in ("scale", "factor"):
        if name in values:
            values[name] = _number(values[name], f"{field}.{name}")
    if "vector" in values:
        values["vector"] = _array(values["vector"], f"{field}.vector")
    return kind(**values)


def edit_to_json(edit: Edit) -> dict[str, Any]:
    """An edit as JSON has it: its word, then its fields."""
    [word] = [word for word, kind in _KINDS.items() if kind is type(edit)]
    values = {part.name: getattr(edit, part.name) for part in fields(edit)} | {"positions": as_json(edit.positions)}
    if "vector" in values:
        values["vector"] = values["vector"].tolist()
    return {"edit": word} | values


def edit_from_json(raw: Any, field: str) -> Edit:
    """The edit that `edit_to_json` wrote. Raises PlanError."""
    if not isinstance(raw, dict) or raw.get("edit") not in _KINDS:
        raise PlanError(field, f"an edit is an object whose \"edit\" is one of {', '.join(_KINDS)}")
    kind = _KINDS[raw["edit"]]
    names = [part.name for part in fields(kind)]
    given = {name: value for name, value in raw.items() if name != "edit"}
    if unknown := given.keys() - set(names):
        raise PlanError(field, f"{raw['edit']} has no field {sorted(unknown)[0]!r}; it has {', '.join(names)}")
    for name in names:
        if name not in given and name not in ("scale", "positions"):
            raise PlanError(field, f"{raw['edit']} needs {name}")
    return checked_edit(kind(**given), field)


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise PlanError(field, f"{value!r} is no finite number")
    return float(value)


def _array(value: Any, field: str) -> "np.ndarray":
    import numpy as np  # not before a plan has a vector: a server's front knows plans, and does without

    if hasattr(value, "detach"):  # a tensor
        value = value.detach().float().cpu().numpy()
    if not isinstance(value, np.ndarray | Sequence | int | float) or isinstance(value, str | bytes | bool):
        raise PlanError(field, f"a vector holds numbers, not {value!r}")
    try:
        array = np.array(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        raise PlanError(field, "a vector holds numbers, in rows of one length") from None
    if not np.isfinite(array).all():
        raise PlanError(field, "a vector holds finite numbers only")
    return array
