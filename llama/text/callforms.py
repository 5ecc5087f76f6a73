"""The forms in which Llama 3.1 and its successors call a tool, each read to its end or until it is none.

    {"type": "function", "name": NAME, "parameters": {...}}
    <function=NAME>{...}</function>
    [NAME(key=value, ...), NAME(...)]
    NAME.call(key=value, ...)           after <|python_tag|> only
    Python code                         after <|python_tag|> only, where code_interpreter is among the tools

In the first, the keys stand in any order; `type` may be missing, `function` may stand for `name` or enclose
the other two, and `arguments` may stand for `parameters`. `</function>` may be missing where the model
ends its reply. Code goes on to that end. NAME is one of the tools that were given.
"""

import json
from collections.abc import Collection, Generator
from dataclasses import dataclass

from llama.text.cursor import CONTROL, JSON, PYTHON, Cursor, MismatchError
from llama.text.literals import is_json_object, python_calls

CODE_INTERPRETER = "code_interpreter"

_CALL_KEYS = frozenset({"name", "parameters", "arguments"})
# Which keys a key leaves no room for: itself, and others that say the same.
_RIVALS = {"type": {"type"}, "name": {"name", "function"}, "function": {"name", "function"},
           "parameters": {"parameters", "arguments"}, "arguments": {"parameters", "arguments"}}


@dataclass(frozen=True)
class ToolCall:
    """A call of the tool `name`. arguments: a JSON object, as text."""

    name: str
    arguments: str


class CallForms:
    """Reads calls of some tools at a cursor, in a text in which CONTROL stands for python tags."""

    def __init__(self, cursor: Cursor, names: Collection[str]):
        self.is_cut = False  # the text's end is none that the model set
        self._cursor = cursor
        self._names = sorted(names)

    def read(self) -> Generator[None, None, list[ToolCall]]:
        """Passes what is written as one, in any form: a call, or several. Raises MismatchError."""
        cursor = self._cursor
        first = yield from cursor.peek()
        is_tagged = first == CONTROL
        if is_tagged:
            cursor.advance()
            first = yield from cursor.spaces()
        try:
            if first == "{":
                return [ToolCall(*(yield from self._object(_CALL_KEYS | {"type", "function"})))]
            if first == "<":
                return [(yield from self._function())]
            if first == "[":
                return (yield from self._list())
            if is_tagged:
                return (yield from self._dotted())
            raise MismatchError
        except MismatchError:
            if not is_tagged or CODE_INTERPRETER not in self._names:
                raise
        return [(yield from self._code())]

    def _object(self, keys: frozenset[str]) -> Generator[None, None, tuple[str, str]]:
        """Name and arguments, out of an object in which only these keys may stand."""
        cursor, name, arguments, after = self._cursor, None, None, ","
        cursor.advance()
        while after == ",":
            key = yield from self._string(keys)
            keys -= _RIVALS[key]
            yield from self._mark(":")
            first = yield from cursor.spaces()
            if key == "type":
                yield from self._string({"function"})
            elif key in ("parameters", "arguments"):
                arguments = yield from self._arguments()
            elif key == "function" and first == "{" and arguments is None:
                name, arguments = yield from self._object(_CALL_KEYS)
                keys -= _CALL_KEYS
            else:
                name = yield from self._string(self._names)
            after = yield from self._mark(",}")
        if name is None or arguments is None:
            raise MismatchError
        return name, arguments

    def _function(self) -> Generator[None, None, ToolCall]:
        cursor = self._cursor
        yield from cursor.literal("<function=")
        name = yield from cursor.word(self._names, ">")
        yield from cursor.spaces()
        arguments = yield from self._arguments()
        if (yield from cursor.spaces()) or self.is_cut:
            yield from cursor.literal("</function>")
        return ToolCall(name, arguments)

    def _list(self) -> Generator[None, None, list[ToolCall]]:
        cursor, start = self._cursor, len(self._cursor.held)
        cursor.advance()
        yield from cursor.spaces()
        yield from cursor.word(self._names, "(")
        yield from cursor.balanced(PYTHON, depth=2)
        calls = self._python(cursor.held[start:])
        if any(call.name not in self._names for call in calls):
            raise MismatchError
        return calls

    def _dotted(self) -> Generator[None, None, list[ToolCall]]:
        cursor = self._cursor
        name = yield from cursor.word(self._names, ".")
        yield from cursor.literal("call(")
        start = len(cursor.held)
        yield from cursor.balanced(PYTHON, depth=1)
        return [ToolCall(name, call.arguments) for call in self._python(f"[call({cursor.held[start:]}]")]

    def _code(self) -> Generator[None, None, ToolCall]:
        cursor = self._cursor
        while (yield from cursor.peek()):
            cursor.advance_all()
        code = cursor.held.partition(CONTROL)[2].replace(CONTROL, "")
        if self.is_cut or not code.strip():
            raise MismatchError
        return ToolCall(CODE_INTERPRETER, json.dumps({"code": code}, ensure_ascii=False))

    # ---- parts of them ----------------------------------------------------------------------------------

    def _arguments(self) -> Generator[None, None, str]:
        """A JSON object, as it is written."""
        cursor, start = self._cursor, len(self._cursor.held)
        if (yield from cursor.peek()) != "{":
            raise MismatchError
        yield from cursor.balanced(JSON)
        arguments = cursor.held[start:]
        if not is_json_object(arguments):
            raise MismatchError
        return arguments

    def _python(self, text: str) -> list[ToolCall]:
        self._cursor.spend(sum(map(text.count, ",:=")))
        calls = python_calls(text)
        if calls is None:
            raise MismatchError
        return [ToolCall(*call) for call in calls]

    def _string(self, words: Collection[str]) -> Generator[None, None, str]:
        """One of these words in double quotes."""
        yield from self._mark('"')
        return (yield from self._cursor.word(sorted(words), '"'))

    def _mark(self, marks: str) -> Generator[None, None, str]:
        """One of these characters."""
        mark = yield from self._cursor.spaces()
        if not mark or mark not in marks:
            raise MismatchError
        self._cursor.advance()
        return mark
