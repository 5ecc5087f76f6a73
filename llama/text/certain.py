"""Tool calls in a reply that a grammar has made (`llama.text.toolgrammar`): certain from their first letters on.

So a call is told before it is whole: its name as soon as that is there, its arguments as they grow.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from llama.text.callforms import ToolCall
from llama.text.toolgrammar import SEPARATOR, beginning

_OUTSIDE = re.compile(r'[^"{}]*')  # of strings
_SPACE = " \t\n\r"
_INSIDE = re.compile(r'[^"\\]*')


@dataclass(frozen=True)
class MoreArguments:
    """More of the arguments of the call that was told last."""

    text: str


class _Beginning:
    """What a call of `name` begins with. text: without space; borders: before which of its characters there may be
    some."""

    def __init__(self, name: str, parts: Sequence[str]):
        self.name = name
        self.text = "".join(parts)
        self.borders = {sum(map(len, parts[:count])) for count in range(1, len(parts))}


Event = str | ToolCall | MoreArguments


class CertainCallStream:
    """Finds the calls in one reply, which is calls from its beginning on, or else text.

    What `push` and `finish` give, in order: of each call a ToolCall without arguments, then these piece by piece;
    and text. A call that the reply's end cuts has been told as far as it came: then `is_open`.
    """

    def __init__(self, names: Collection[str]):
        """names: the tools that may be called."""
        self.is_open = False
        self._first = [_Beginning(name, beginning(name)) for name in names]
        self._later = [_Beginning(name, (SEPARATOR.strip(), *beginning(name))) for name in names]
        self._possible = self._first  # the calls that may be beginning
        self._read = self._read_beginning  # what comes next
        self._held = ""  # perhaps the beginning of a call
        self._num_matched = 0  # characters of it, without the space between its parts
        self._depth = 0  # of braces in the arguments
        self._in_string = self._is_escaped = False
        self._events: list[Event] = []

    def push(self, text: str, ids: Iterable[int] = ()) -> list[Event]:
        """Takes the text that became certain, as TextStream has it; returns what is certain now."""
        place = 0
        while place < len(text):
            place = self._read(text, place)
        events, self._events = self._events, []
        return events

    def finish(self, *, is_cut: bool) -> list[Event]:
        """Ends the reply; returns the rest."""
        held, self._held = self._held, ""
        return [held] if held else []

    # ---- each reads on from a place, and returns how far it came ----------------------------------------

    def _read_beginning(self, text: str, place: int) -> int:
        character = text[place]
        self._held += character
        possible = [each for each in self._possible if self._num_matched in each.borders] if character in _SPACE else []
        if not possible:
            possible = [each for each in self._possible if each.text[self._num_matched] == character]
            self._num_matched += 1
        self._possible = possible
        if not possible:
            self._events.append(self._held)
            self._held, self._read = "", self._read_text
        elif self._num_matched == len(possible[0].text):
            self.is_open = True
            self._events.append(ToolCall(possible[0].name, ""))
            self._held, self._read = "", self._read_arguments
        return place + 1

    def _read_arguments(self, text: str, place: int) -> int:
        if self._depth == 0 and text[place] in _SPACE:  # before the first brace
            return place + 1
        start = place
        while place < len(text) and self._read == self._read_arguments:
            if self._is_escaped:
                place += 1
                self._is_escaped = False
                continue
            place = (_INSIDE if self._in_string else _OUTSIDE).match(text, place).end()
            if place < len(text):
                self._pass(text[place])
                place += 1
        self._events.append(MoreArguments(text[start:place]))
        return place

    def _pass(self, mark: str) -> None:
        """A character of the arguments that means something for where they end."""
        if mark == '"':
            self._in_string = not self._in_string
        elif mark == "\\":
            self._is_escaped = True
        else:
            self._depth += 1 if mark == "{" else -1
            if self._depth == 0:
                self._read = self._read_closing

    def _read_closing(self, text: str, place: int) -> int:
        """The brace that closes the call, perhaps after space; another call may follow."""
        if text[place] not in _SPACE:
            self.is_open = False
            self._possible, self._num_matched, self._read = self._later, 0, self._read_beginning
        return place + 1

    def _read_text(self, text: str, place: int) -> int:
        self._events.append(text[place:])
        return len(text)
