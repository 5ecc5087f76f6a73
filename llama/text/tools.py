"""Tool calls in a reply, found while it comes: what is a call becomes one, and everything else stays text.

A call, in one of the forms of llama.text.callforms, may begin where the reply begins, where a line begins, at
<|python_tag|>, and after another call. White space around it, and a semicolon between two, belong to it.

What only resembles a call is text: also the call of a tool that was not given, one that turns out malformed,
and one that the reply's end cuts. A call is therefore told when it is whole, for what has been sent cannot be
called back; where a grammar makes the calls, llama.text.certain tells them as they grow. Text is held back only
while it may be the beginning of a call: `{"answer` and `[1` cannot.
"""

import codecs
import re
from collections import deque
from collections.abc import Collection, Generator, Iterable

from llama.text.callforms import CODE_INTERPRETER, CallForms, ToolCall
from llama.text.cursor import CONTROL, Cursor, MismatchError
from llama.text.tokenizer import Tokenizer

__all__ = ["BUILTIN_TOOLS", "ToolCall", "ToolCallStream"]

BUILTIN_TOOLS = ("brave_search", "wolfram_alpha", CODE_INTERPRETER)
PYTHON_TAG = "<|python_tag|>"
MAX_BEGINNINGS = 128  # of calls, true and false ones, that are followed up; the rest of the reply is text

_OPENERS = frozenset("{[<" + CONTROL)
# A line's beginning before one of them, or where it is not known yet what comes.
_PLACE = re.compile(rf"\n[^\S\n]*+(?=[{{\[<{CONTROL}]|\Z)|(?={CONTROL})")
_SPACES = re.compile(r"\s*")


class ToolCallStream:
    """Finds the calls of tools in one reply.

    What `push` and `finish` give, in order, is the reply: its text, and the calls where they stood. It is the
    same however the reply comes in pieces. Time is linear in the reply.
    """

    is_open = False  # no call is ever told in part

    def __init__(self, tokenizer: Tokenizer, names: Collection[str], *, skip_special_tokens: bool = True):
        """names: the tools that may be called. skip_special_tokens: the text is without control tokens."""
        self._tokenizer = tokenizer
        self._tag_id = tokenizer.special_tokens.get(PYTHON_TAG)
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_decoded = 0  # characters of all ids so far
        self._num_taken = 0  # characters of text so far: fewer, while some are held back
        self._tags: deque[int] = deque()  # where in the text there are python tags which it has not reached
        self._cursor = Cursor()
        self._forms = CallForms(self._cursor, names)
        self._events: list[str | ToolCall] = []
        self._reading = self._reply()
        next(self._reading)

    def push(self, text: str, ids: Iterable[int] = ()) -> list[str | ToolCall]:
        """Takes the next ids, and the text that became certain with them, as TextStream has it.

        Returns what is certain now: text, never empty, and calls.
        """
        for token_id in ids:
            if not (self._skip_special_tokens and self._tokenizer.is_special(token_id)):
                self._num_decoded += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
            if token_id == self._tag_id:
                self._tags.append(self._num_decoded)
        self._cursor.feed(self._tagged(text))
        return self._read()

    def finish(self, *, is_cut: bool) -> list[str | ToolCall]:
        """Ends the reply; returns the rest. is_cut: a limit or a stop string set its end, not the model."""
        self._cursor.is_over, self._forms.is_cut = True, is_cut
        return self._read()

    def _tagged(self, text: str) -> str:
        """The text with CONTROL in the places of python tags: what spells one is none."""
        pieces, start = [], 0
        while self._tags and self._tags[0] <= self._num_taken + len(text):
            place = self._tags.popleft() - self._num_taken
            pieces += [text[start:place], CONTROL]
            start = place
        self._num_taken += len(text)
        return "".join([*pieces, text[start:]])

    def _read(self) -> list[str | ToolCall]:
        next(self._reading, None)
        events, self._events = self._events, []
        return events

    def _reply(self) -> Generator[None, None, None]:
        """Reads all of a reply. At the head of the loop, the cursor is where a call may begin."""
        cursor, num_beginnings, follows_call = self._cursor, 0, False
        while num_beginnings < MAX_BEGINNINGS:
            if (yield from cursor.spaces()) == ";" and follows_call:
                cursor.advance()
                yield from cursor.spaces()
            if not (yield from cursor.peek()):
                break
            num_beginnings += 1
            try:
                calls = yield from self._forms.read()
            except MismatchError:
                calls = []
            follows_call = bool(calls)
            if follows_call:
                cursor.release()
                self._events += calls
            else:
                yield from self._text()
        if follows_call:  # what follows it, if anything, is space
            cursor.release()
        while (yield from cursor.peek()):
            cursor.advance_all()
            self._emit_held()
        self._emit_held()

    def _text(self) -> Generator[None, None, None]:
        """Emits what is held and what comes, up to where a call may begin next."""
        cursor = self._cursor
        _, line_break, indent = self._emit_held().rpartition("\n")
        begins_line = bool(line_break) and not indent.strip()
        while True:
            if begins_line:
                while (character := (yield from cursor.peek())).isspace():
                    cursor.seek(_SPACES)
                    self._emit_held()
                if not character or character in _OPENERS:
                    return
            begins_line = cursor.seek(_PLACE)
            self._emit_held()
            if not begins_line and not (yield from cursor.peek()):
                return

    def _emit_held(self) -> str:
        """Makes text of what is held, and gives it."""
        held = self._cursor.release()
        if text := held.replace(CONTROL, ""):
            if self._events and isinstance(self._events[-1], str):
                text = self._events.pop() + text
            self._events.append(text)
        return held
