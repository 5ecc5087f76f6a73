"""JSON objects: what fields they have, and that they have no others."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.body import read_json
from server.fields import FieldError, Place, Type, nullable

_DIGITS = "0|[1-9][0-9]{0,9}"


@dataclass(frozen=True)
class Field:
    """A field of an object: its type, a note for people, and what stands for its absence.

    null is the same as absence, except where the field is required or `has_null`: there it is a value.
    """

    type: Type
    note: str = ""
    default: Any = None
    required: bool = False
    has_null: bool = False

    @property
    def null_is_absence(self) -> bool:
        """Whether null says nothing here."""
        return not (self.required or self.has_null)

    def schema(self) -> dict[str, Any]:
        """The type with note and default, for documents."""
        schema = nullable(self.type.schema()) if self.null_is_absence else dict(self.type.schema())
        if self.note:
            schema["description"] = self.note
        if self.default is not None:
            schema["default"] = list(self.default) if isinstance(self.default, tuple) else self.default
        return schema


@dataclass(frozen=True)
class Object(Type):
    """An object of these fields and no others."""

    fields: Mapping[str, Field]
    what = "an object"

    def check(self, value: Any, place: Place) -> dict[str, Any]:
        """The fields that were given, in the order in which they were; without those that are null."""
        if not isinstance(value, dict):
            raise self.refuse(value, place)
        checked = {}
        for name, item in value.items():
            field = self.fields.get(name)
            if field is not None and not (item is None and field.null_is_absence):
                checked[name] = field.type.check(item, (*place, name))
        for name in value:
            if name not in self.fields:
                raise FieldError((*place, name), "is not a field that this server knows; leave it out",
                                 "unknown_parameter")
        for name, field in self.fields.items():
            if field.required and name not in checked:
                raise FieldError((*place, name), "is missing", "missing_required_parameter")
        return checked

    def read(self, value: Any, **defaults: Any) -> dict[str, Any]:
        """All fields of a whole request: as given, or else by `defaults`, or else their own. Raises FieldError."""
        own = {name: field.default for name, field in self.fields.items()}
        return own | defaults | self.check(value, ())

    def schema(self) -> dict[str, Any]:
        required = [name for name, field in self.fields.items() if field.required]
        return {"type": "object", "properties": {name: field.schema() for name, field in self.fields.items()},
                **({"required": required} if required else {}), "additionalProperties": False}


@dataclass(frozen=True)
class TokenKey(Type):
    """A token id in digits, as a key must be; checked, it is the number."""

    vocab_size: int

    @property
    def what(self) -> str:
        return f"a token id from 0 to {self.vocab_size - 1}"

    def check(self, value: Any, place: Place) -> int:
        if not re.fullmatch(_DIGITS, value) or int(value) >= self.vocab_size:
            raise FieldError(place, f"is a wrong key: it must be {self.what}", "invalid_value")
        return int(value)

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": f"^(?:{_DIGITS})$"}


@dataclass(frozen=True)
class Map(Type):
    """An object of up to `high` entries, all keys of one kind and all values of one."""

    key: Type
    value: Type
    high: int

    @property
    def what(self) -> str:
        return f"an object of at most {self.high} entries"

    def check(self, value: Any, place: Place) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise self.refuse(value, place)
        if len(value) > self.high:
            raise FieldError(place, f"must be {self.what}, not of {len(value)}", "invalid_value")
        return {self.key.check(key, (*place, key)): self.value.check(item, (*place, key))
                for key, item in value.items()}

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "propertyNames": self.key.schema(),
                "additionalProperties": self.value.schema(), "maxProperties": self.high}


@dataclass(frozen=True)
class AnyObject(Type):
    """Any JSON object; its meaning is somebody else's."""

    what = "an object"

    def check(self, value: Any, place: Place) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.refuse(value, place)
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "object"}


@dataclass(frozen=True)
class ObjectText(Type):
    """A JSON object written into a string, as arguments of tool calls are; an empty string is {}."""

    what = "a JSON object in a string"

    def check(self, value: Any, place: Place) -> dict[str, Any]:
        if not isinstance(value, str):
            raise self.refuse(value, place)
        data = read_json(value, place) if value else {}
        if not isinstance(data, dict):
            raise self.refuse(value, place)
        return data

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "contentMediaType": "application/json"}
