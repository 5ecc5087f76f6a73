"""Which tokens of a sequence are meant: said before its length is known, in numbers or in JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Positions = int | Iterable[int] | slice | None


class PlanError(ValueError):
    """A plan that cannot be carried out. `field` names the part that must change."""

    def __init__(self, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.field = field


@dataclass(frozen=True)
class Where:
    """Positions of one sequence: these, or all from `start` up to `stop`, which None leaves open for what is generated.

    exact: in the order in which they were named; None for a range.
    """

    start: int = 0
    stop: int | None = None
    exact: tuple[int, ...] | None = None

    def __contains__(self, position: int) -> bool:
        if self.exact is not None:
            return position in self.exact
        return position >= self.start and (self.stop is None or position < self.stop)

    @property
    def first(self) -> int:
        """The smallest position that is meant."""
        return self.start if self.exact is None else min(self.exact)

    def count(self, length: int) -> int:
        """How many positions of a sequence of this length are meant."""
        return len(self.within(0, length))

    def within(self, start: int, end: int) -> Sequence[int]:
        """Those meant among start .. end - 1, in rising order."""
        if self.exact is not None:
            return sorted(position for position in self.exact if start <= position < end)
        return range(max(start, self.start), max(start, self.start, end if self.stop is None else min(end, self.stop)))


def locate(positions: Positions, num_prompt: int, most: int, field: str) -> Where:
    """The positions of a sequence whose prompt has `num_prompt` tokens and of which at most `most` are computed.

    None is all of them, those that are generated too; a negative number counts from the end of the prompt, as in a
    list; a slice without an end goes on through what is generated. Raises PlanError for what cannot be there.
    """
    if positions is None:
        return Where()
    if isinstance(positions, slice):
        start, stop = (_from_end(bound, num_prompt) for bound in (positions.start or 0, positions.stop))
        if start >= (most if stop is None else min(stop, most)):
            raise PlanError(field, f"the range {_text(positions)} is empty: the prompt has {num_prompt} tokens")
        return Where(start, stop)
    exact = tuple(_from_end(one, num_prompt) for one in ([positions] if isinstance(positions, int) else positions))
    if not exact:
        raise PlanError(field, "the list of positions is empty; leave it out for all positions")
    if len(set(exact)) < len(exact):
        raise PlanError(field, f"the positions {list(exact)} name one twice")
    for position in exact:
        if not 0 <= position < most:
            raise PlanError(field, f"position {position} is never computed: the prompt has {num_prompt} tokens, and "
                            f"with what may be generated at most {most} positions are")
    return Where(exact=exact)


def _from_end(bound: int | None, num_prompt: int) -> int | None:
    return bound + num_prompt if bound is not None and bound < 0 else bound


def _text(positions: slice) -> str:
    return f"{'' if positions.start is None else positions.start}:{'' if positions.stop is None else positions.stop}"


def checked(positions: Any, field: str) -> Positions:
    """Positions as they were given, or as they stand in JSON: a whole number, a list of them, {"start", "stop"}.

    Raises PlanError for anything else.
    """
    if isinstance(positions, dict):
        if not positions.keys() <= {"start", "stop"}:
            raise PlanError(field, "a range of positions has start and stop, and nothing else")
        positions = slice(positions.get("start"), positions.get("stop"))
    if isinstance(positions, slice):
        if positions.step not in (None, 1) or not all(bound is None or _is_whole(bound)
                                                      for bound in (positions.start, positions.stop)):
            raise PlanError(field, "start and stop of a range of positions are whole numbers, and there is no step")
        return positions
    if positions is None or _is_whole(positions):
        return positions
    if isinstance(positions, Iterable) and not isinstance(positions, str):
        listed = tuple(positions)
        if all(map(_is_whole, listed)):
            return listed
    raise PlanError(field, f"positions are a whole number, a list of them or a range, not {positions!r}")


def as_json(positions: Positions) -> Any:
    """The form that `checked` reads."""
    if isinstance(positions, slice):
        return {"start": positions.start, "stop": positions.stop}
    return list(positions) if isinstance(positions, tuple) else positions


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
