"""What a field of a request may be: each type checks a value, and says the same as JSON Schema.

`check` gives the value as the server goes on with it, or raises FieldError with the place. `schema` is the
type in JSON Schema 2020-12, the dialect of OpenAPI 3.1. `what` names it in messages: "must be {what}".
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Place = tuple[str | int, ...]  # the way to a value: ("messages", 0, "content")

MAX_NAMED = 64  # characters of what a client sent that an error repeats

_PLAIN_NAME = re.compile(rf"[\w-]{{1,{MAX_NAMED}}}")


class FieldError(ValueError):
    """A value that is not what its field takes. `place` is where, `code` the kind of fault.

    expected: what would have been right, if that is all there is to say. reached: how far the value was good.
    """

    def __init__(self, place: Place, complaint: str, code: str, expected: str | None = None,
                 reached: Place | None = None):
        super().__init__(f"{place_name(place) or 'the body'} {complaint}")
        self.place = place
        self.code = code
        self.expected = expected
        self.reached = place if reached is None else reached


def place_name(place: Place) -> str:
    """A place as in `messages[0].content`; a key that is no plain name is quoted: `metadata["a b"]`."""
    steps = (f".{step}" if isinstance(step, str) and _PLAIN_NAME.fullmatch(step) else f"[{shown(step)}]"
             for step in place)
    return "".join(steps).removeprefix(".")


def value_at(value: Any, place: Place) -> Any:
    """What stands at a place below a value."""
    for step in place:
        value = value[step]
    return value


def shown(value: Any) -> str:
    """A JSON value for a message: short, and its kind where it is long."""
    if isinstance(value, str):
        return json.dumps(value if len(value) <= MAX_NAMED else value[:MAX_NAMED] + "…", ensure_ascii=False)
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"an array of {len(value)}"
    return json.dumps(value)


class Type(ABC):
    """A kind of JSON value."""

    @property
    @abstractmethod
    def what(self) -> str:
        """The kind in words, with its article."""

    @abstractmethod
    def check(self, value: Any, place: Place) -> Any:
        """The value to go on with. Raises FieldError."""

    @abstractmethod
    def schema(self) -> dict[str, Any] | None:
        """The kind in JSON Schema; None for what is always refused."""

    def refuse(self, value: Any, place: Place, reached: Place | None = None) -> FieldError:
        """The error for a value of another kind."""
        complaint = f"must be {self.what}, not {shown(value)}"
        return FieldError(place, complaint, "invalid_value", self.what, reached)


@dataclass(frozen=True)
class Null(Type):
    """null, where that says something."""

    what = "null"

    def check(self, value: Any, place: Place) -> None:
        if value is not None:
            raise self.refuse(value, place)

    def schema(self) -> dict[str, Any]:
        return {"type": "null"}


@dataclass(frozen=True)
class Boolean(Type):
    """true or false."""

    what = "true or false"

    def check(self, value: Any, place: Place) -> bool:
        if not isinstance(value, bool):
            raise self.refuse(value, place)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Number(Type):
    """A number from `low` to `high`, or above `low` if so said. Booleans are none."""

    low: float
    high: float
    above_low: bool = False

    @property
    def what(self) -> str:
        return f"a number above {self.low} and at most {self.high}" if self.above_low \
            else f"a number from {self.low} to {self.high}"

    def check(self, value: Any, place: Place) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high or (self.above_low and value == self.low):
            raise self.refuse(value, place)
        return float(value)

    def schema(self) -> dict[str, Any]:
        low = "exclusiveMinimum" if self.above_low else "minimum"
        return {"type": "number", low: self.low, "maximum": self.high}


@dataclass(frozen=True)
class Integer(Type):
    """A whole number from `low` to `high`; 2.0 is one, as in JSON Schema."""

    low: int
    high: int

    @property
    def what(self) -> str:
        return str(self.low) if self.low == self.high else f"an integer from {self.low} to {self.high}"

    def check(self, value: Any, place: Place) -> int:
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not self.low <= value <= self.high:
            raise self.refuse(value, place)
        return int(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class String(Type):
    """Text of `low` to `high` characters that matches `pattern` whole; without `high`, as long as a body."""

    low: int = 0
    high: int | None = None
    pattern: str | None = None

    @property
    def what(self) -> str:
        if self.pattern is not None:
            return f"a string that matches {self.pattern}"
        if self.high is None:
            return "a string" if self.low == 0 else "a string that is not empty"
        return f"a string of {self.low} to {self.high} characters"

    def check(self, value: Any, place: Place) -> str:
        if not isinstance(value, str) or len(value) < self.low or len(value) > (self.high or len(value)):
            raise self.refuse(value, place)
        if self.pattern is not None and not re.fullmatch(self.pattern, value):
            raise self.refuse(value, place)
        return value

    def schema(self) -> dict[str, Any]:
        bounds = {"minLength": self.low or None, "maxLength": self.high,
                  "pattern": self.pattern and f"^(?:{self.pattern})$"}
        return {"type": "string"} | {name: bound for name, bound in bounds.items() if bound is not None}


@dataclass(frozen=True)
class Choice(Type):
    """One of some strings."""

    values: tuple[str, ...]

    @property
    def what(self) -> str:
        names = [f'"{value}"' for value in self.values]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"

    def check(self, value: Any, place: Place) -> str:
        if not isinstance(value, str) or value not in self.values:
            raise self.refuse(value, place)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.values)}


@dataclass(frozen=True)
class Array(Type):
    """`low` to `high` items of one kind, called `items`. Of more, no more than `high` are looked at."""

    item: Type
    low: int
    high: int
    items: str

    @property
    def what(self) -> str:
        return f"an array of {self.low} to {self.high} {self.items}"

    def check(self, value: Any, place: Place) -> list[Any]:
        if not isinstance(value, list) or len(value) < self.low:
            raise self.refuse(value, place)
        items = [self.item.check(item, (*place, index)) for index, item in enumerate(value[:self.high])]
        if len(value) > self.high:
            raise self.refuse(value, place, reached=(*place, self.high))
        return items

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": self.item.schema(), "minItems": self.low, "maxItems": self.high}


@dataclass(frozen=True)
class AnyOf(Type):
    """A value of one of several kinds. Where it is none of them, those complain that it came nearest to."""

    kinds: tuple[Type, ...]

    @property
    def what(self) -> str:
        return ", or ".join(kind.what for kind in self.kinds if not isinstance(kind, Refused))

    def check(self, value: Any, place: Place) -> Any:
        """What the first kind that takes the value makes of it. Raises FieldError: see the class."""
        errors: list[FieldError] = []
        for kind in self.kinds:
            try:
                return kind.check(value, place)
            except FieldError as error:
                if error.code == "unsupported_value":
                    raise
                if not isinstance(kind, Refused):
                    errors.append(error)
        furthest = max(error.reached for error in errors)
        nearest = [error for error in errors if error.reached == furthest]
        expected = dict.fromkeys(error.expected for error in nearest)
        if len(expected) == 1 or None in expected:
            raise nearest[0]
        where = nearest[0].place
        found = value_at(value, where[len(place):])
        raise FieldError(where, f"must be {', or '.join(expected)}, not {shown(found)}", "invalid_value")

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [kind.schema() for kind in self.kinds if not isinstance(kind, Refused)]}


@dataclass(frozen=True)
class Refused(Type):
    """What clients may know from elsewhere, and this server does not do; `why` follows "is not supported"."""

    kind: Type
    why: str

    @property
    def what(self) -> str:
        return self.kind.what

    def check(self, value: Any, place: Place) -> None:
        self.kind.check(value, place)
        raise FieldError(place, f"{shown(value)} is not supported{self.why}", "unsupported_value")

    def schema(self) -> None:
        return None


def nullable(schema: Mapping[str, Any] | None) -> dict[str, Any]:
    """The schema that takes null besides."""
    if schema is None or schema == {"type": "null"}:
        return {"type": "null"}
    if "type" in schema and "enum" not in schema:
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]}
