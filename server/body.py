"""Bytes to JSON data, strictly: what is malformed is refused with its place, and before it can do harm."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from server.fields import FieldError, Place

MAX_DEPTH = 64
MAX_DIGITS = 20  # as many as 64 bits can take, or a sign and one less

# Strings, also one that does not end, so that no quote is looked at twice.
_STRING = re.compile(r'"(?:[^"\\]++|\\.?)*+"?', re.DOTALL)
_NOT_BRACKETS = re.compile(r"[^\[\]{}]+")
_ONE_KIND = str.maketrans("{}", "[]")


class _Flaw:
    """Stands in the data where the parser met what JSON has not, or has not here; says what it was."""

    def __init__(self, complaint: str):
        self.complaint = complaint


def read_json(body: bytes | str, place: Place = ()) -> Any:
    """The data in a JSON text, which stands at `place`.

    Raises FieldError, naming the place, for what is not JSON in UTF-8, is nested deeper than MAX_DEPTH, or
    has a key twice, NaN, Infinity, numbers of more than MAX_DIGITS digits or beyond the range of a float.
    """
    try:
        text = body.decode("utf-8") if isinstance(body, bytes) else body
    except UnicodeDecodeError as error:
        raise FieldError(place, f"is not UTF-8 at byte {error.start}", "invalid_json") from None
    _refuse_deep(text, place)
    flaws: list[_Flaw] = []

    def flaw(complaint: str) -> _Flaw:
        flaws.append(_Flaw(complaint))
        return flaws[-1]

    def whole(digits: str) -> int | _Flaw:
        is_short = len(digits) <= MAX_DIGITS
        return int(digits) if is_short else flaw(f"is a number of more than {MAX_DIGITS} digits")

    def fraction(digits: str) -> float | _Flaw:
        value = float(digits)
        return value if math.isfinite(value) else flaw("is too large a number")

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """An object, in which a name that comes twice has a flaw for its value."""
        data = dict(pairs)
        if len(data) < len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    data[key] = flaw("is given twice")
                seen.add(key)
        return data

    decoder = json.JSONDecoder(object_pairs_hook=mapping, parse_int=whole, parse_float=fraction,
                               parse_constant=lambda name: flaw(f"is {name}, which JSON does not have"))
    try:
        data = decoder.decode(text)
    except json.JSONDecodeError as error:
        problem = f"is not valid JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        raise FieldError(place, problem, "invalid_json") from None
    if flaws:
        where, found = _find_flaw(data, place)
        raise FieldError(where, found.complaint, "invalid_json")
    return data


def _refuse_deep(text: str, place: Place) -> None:
    """Before anything recurses. Taking out all innermost pairs of brackets lowers the depth by one."""
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    brackets = _NOT_BRACKETS.sub("", _STRING.sub("", text)).translate(_ONE_KIND)
    rounds = 0
    while "[]" in brackets and rounds <= MAX_DEPTH:
        brackets = brackets.replace("[]", "")
        rounds += 1
    # What is left are closing brackets too many, then opening ones: these enclose whatever follows.
    if rounds + brackets.count("[") > MAX_DEPTH:
        raise FieldError(place, f"is nested deeper than {MAX_DEPTH}", "invalid_json")


def _find_flaw(data: Any, place: Place) -> tuple[Place, _Flaw] | None:
    """The first flaw in the data, with its place."""
    if isinstance(data, _Flaw):
        return place, data
    items = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        if isinstance(value, (_Flaw, dict, list)) and (found := _find_flaw(value, (*place, key))):
            return found
    return None
