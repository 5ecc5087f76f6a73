"""Reading text that comes in pieces, without ever going back.

Methods that are generators read one thing from the cursor on. Where the text so far has come to its end they
wait, with `yield`, for the next piece; they raise MismatchError where the text is something else.
"""

import re
from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import dataclass

MAX_DEPTH = 32  # of brackets in brackets
MAX_WORK = 32_768  # brackets in one text, and whatever else takes time in the same measure

CONTROL = "\ud800"  # stands for a control token in a text: text itself has no lone surrogates

_SPACES = re.compile(r"\s*")


class MismatchError(Exception):
    """The text is not what was to be read; the cursor is where that shows."""


@dataclass(frozen=True)
class Syntax:
    """How a language encloses things. `no_brackets` steps over all that is no bracket, whole strings too;
    `in_string` over what is between the two quotes of a kind."""

    no_brackets: re.Pattern[str]
    in_string: dict[str, re.Pattern[str]]

    @classmethod
    def of(cls, brackets: str, quotes: str) -> "Syntax":
        """The syntax with these pairs of brackets, and strings between two of the same quotes."""
        inside = {quote: rf"(?:[^{quote}\\\x00-\x1f{CONTROL}]++|\\[^{CONTROL}])*+" for quote in quotes}
        strings = "|".join(f"{quote}{pattern}{quote}" for quote, pattern in inside.items())
        others = f"[^{quotes}{re.escape(brackets)}{CONTROL}]*+"
        return cls(re.compile(f"{others}(?:(?:{strings}){others})*+", re.DOTALL),
                   {quote: re.compile(pattern, re.DOTALL) for quote, pattern in inside.items()})


JSON = Syntax.of("[]{}", '"')
PYTHON = Syntax.of("()[]{}", "\"'")


class Cursor:
    """A place in a text. What it has passed is held until it is released."""

    def __init__(self) -> None:
        self.is_over = False  # no piece will come after this one
        self._piece = ""
        self._start = self._place = 0  # in the piece: of what is held, and of the cursor
        self._held: list[str] = []  # of the pieces before
        self._work = 0

    def feed(self, piece: str) -> None:
        """The next piece, once the cursor has come to the end of the one before."""
        if self._start < len(self._piece):
            self._held.append(self._piece[self._start:])
        self._piece, self._start, self._place = piece, 0, 0

    @property
    def held(self) -> str:
        """What the cursor has passed since the last release."""
        self._held = ["".join([*self._held, self._piece[self._start:self._place]])]
        self._start = self._place
        return self._held[0]

    def release(self) -> str:
        """What is held, which is held no more."""
        text, self._held = self.held, []
        return text

    def advance(self) -> None:
        """Passes the character at the cursor."""
        self._place += 1

    def advance_all(self) -> None:
        """Passes all that has come."""
        self._place = len(self._piece)

    def seek(self, pattern: re.Pattern[str]) -> bool:
        """Passes the next match in the piece, or else the rest of the piece."""
        found = pattern.search(self._piece, self._place)
        self._place = found.end() if found else len(self._piece)
        return found is not None

    def spend(self, work: int) -> None:
        """Raises MismatchError where the text takes more time than it may."""
        self._work += work
        if self._work > MAX_WORK:
            raise MismatchError

    # ---- what waits for the text ------------------------------------------------------------------------

    def peek(self) -> Generator[None, None, str]:
        """The character at the cursor; "" at the text's end."""
        while self._place == len(self._piece):
            if self.is_over:
                return ""
            yield
        return self._piece[self._place]

    def spaces(self) -> Generator[None, None, str]:
        """Passes white space; gives the character after it."""
        while (character := (yield from self.peek())).isspace():
            self._place = _SPACES.match(self._piece, self._place).end()
        return character

    def literal(self, text: str) -> Generator[None, None, None]:
        """Passes this text."""
        for character in text:
            if (yield from self.peek()) != character:
                raise MismatchError
            self._place += 1

    def word(self, words: Sequence[str], end: str) -> Generator[None, None, str]:
        """Passes one of these words, which are sorted, and the character `end` after it; gives the word."""
        word, nearest = "", 0  # the first of the words that does not come before what was passed
        while (character := (yield from self.peek())) != end:
            word += character
            nearest = bisect_left(words, word)
            if not character or nearest == len(words) or not words[nearest].startswith(word):
                raise MismatchError
            self._place += 1
        if words[nearest:nearest + 1] != [word]:
            raise MismatchError
        self._place += 1
        return word

    def balanced(self, syntax: Syntax, depth: int = 0) -> Generator[None, None, None]:
        """Passes a bracket and all to the one that closes it. depth: brackets that are open already."""
        while True:
            self._place = syntax.no_brackets.match(self._piece, self._place).end()
            if self._place == len(self._piece):
                if not (yield from self.peek()):
                    raise MismatchError
                continue
            character = self._piece[self._place]
            if character in syntax.in_string:
                yield from self._string(syntax, character)
                continue
            if character == CONTROL:
                raise MismatchError
            self._place += 1
            depth += 1 if character in "([{" else -1
            if depth == 0:
                return
            if depth > MAX_DEPTH:
                raise MismatchError
            self.spend(1)

    def _string(self, syntax: Syntax, quote: str) -> Generator[None, None, None]:
        """Passes a string, of which the end may be in a later piece."""
        self._place += 1
        while (character := (yield from self.peek())) != quote:
            if not character or character == CONTROL or character < " ":
                raise MismatchError
            if character == "\\":
                self._place += 1
                if (yield from self.peek()) in ("", CONTROL):
                    raise MismatchError
                self._place += 1
            self._place = syntax.in_string[quote].match(self._piece, self._place).end()
        self._place += 1
