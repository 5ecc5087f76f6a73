"""What a model wrote as the arguments of a call, read strictly: JSON, and calls in Python's form.

Nothing is evaluated. Callers bound how deep brackets stand in one another, and how much there is to read.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from llama.text.tokenizer import valid_text

_CONSTANTS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}

_TOKEN = re.compile(r"""\s*+ (?:
    (?P<string> "(?:[^"\\]++|\\.)*+" | '(?:[^'\\]++|\\.)*+' )
  | (?P<number> -? (?: (?:0|[1-9][0-9]*+) (?:\.[0-9]*+)? | \.[0-9]++ ) (?:[eE][+-]?[0-9]++)? )
  | (?P<name> [^\W\d][\w.-]*+ )
  | (?P<mark> [\[\](){},:=] )
  | (?P<end> \Z )
)""", re.VERBOSE | re.DOTALL)

_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": "", "\\": "\\",
            "'": "'", '"': '"'}


def is_json_object(text: str) -> bool:
    """Whether a text is an object in strict JSON: no key twice, no NaN, no number too large for a float."""
    try:
        data = json.loads(text, object_pairs_hook=_unique, parse_constant=_refused, parse_float=_finite)
    except ValueError:
        return False
    return isinstance(data, dict)


def python_calls(text: str) -> list[tuple[str, str]] | None:
    """The calls in `[f(a=1), g(b="x")]`: of each the name, and the arguments as a JSON object.

    Every argument has its name; values are strings, numbers, True, False, None (true, false, null), lists,
    and dictionaries with strings for keys. None where the text is anything else.
    """
    try:
        calls = _Python(text).calls()
    except ValueError:
        return None
    return [(name, valid_text(json.dumps(arguments, ensure_ascii=False))) for name, arguments in calls]


class _Python:
    """Reads one text. Its methods raise ValueError where the text is not what they read."""

    def __init__(self, text: str):
        self._tokens = self._split(text)
        self._kind, self._token = next(self._tokens)

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """A list of calls, which is the whole text."""
        self._take("[")
        calls = []
        while not calls or self._token != "]":
            name = self._take_kind("name")
            self._take("(")
            calls.append((name, self._pairs("name", "=", ")")))
            self._end_item("]")
        self._take("]")
        self._take_kind("end")
        return calls

    def _pairs(self, key_kind: str, equals: str, closing: str) -> dict[str, Any]:
        """Named values to the closing bracket: the arguments of a call, or what is in a dictionary."""
        pairs: dict[str, Any] = {}
        while self._token != closing:
            key = self._take_kind(key_kind)
            key = _string(key) if key_kind == "string" else key
            if key in pairs:
                raise ValueError(f"{key} is given twice")
            self._take(equals)
            pairs[key] = self._value()
            self._end_item(closing)
        self._take(closing)
        return pairs

    def _value(self) -> Any:
        kind, token = self._kind, self._token
        self._advance()
        if kind == "string":
            return _string(token)
        if kind == "number":
            return int(token) if token.lstrip("-").isdigit() else _finite(token)
        if kind == "name" and token in _CONSTANTS:
            return _CONSTANTS[token]
        if token == "{":
            return self._pairs("string", ":", "}")
        if token != "[":
            raise ValueError(f"{token} is no literal")
        items = []
        while self._token != "]":
            items.append(self._value())
            self._end_item("]")
        self._take("]")
        return items

    def _end_item(self, closing: str) -> None:
        """The comma that ends an item; none is needed before the closing bracket."""
        if self._token != closing:
            self._take(",")

    def _take(self, mark: str) -> None:
        if self._token != mark:  # no other kind of token looks like a mark: strings keep their quotes
            raise ValueError(f"{mark} is missing")
        self._advance()

    def _take_kind(self, kind: str) -> str:
        if self._kind != kind:
            raise ValueError(f"a {kind} is missing")
        token = self._token
        self._advance()
        return token

    def _advance(self) -> None:
        self._kind, self._token = next(self._tokens)

    @staticmethod
    def _split(text: str) -> Iterator[tuple[str, str]]:
        """The kind of each token, and the token; after the last, ends without end."""
        position = 0
        while found := _TOKEN.match(text, position):
            yield found.lastgroup, found[found.lastgroup]
            position = found.end()
        raise ValueError("there is what no literal has")


def _string(token: str) -> str:
    """A string in its quotes, as it is meant."""
    return _ESCAPE.sub(_unescaped, token[1:-1])


def _unescaped(escape: re.Match[str]) -> str:
    digits = escape[1] or escape[2] or escape[3]
    if digits:
        return chr(int(digits, 16))  # ValueError where there is no such character
    return _ESCAPED.get(escape[4], escape[0])  # an unknown one stays as it is, as in Python


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        raise ValueError("a key is given twice")
    return data


def _refused(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is too large a number")
    return value
