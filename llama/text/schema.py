"""JSON schemas as a constraint: what they may say (2020-12, as far as it can be guaranteed), and how big they are.

A keyword that cannot be guaranteed is refused, never ignored; one that says nothing about values is dropped.
Whether what the keywords say together can be followed is llguidance's to tell (`llama.text.grammar`).
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llama.text.guidance import GrammarError

MAX_SIZE = 65_536  # characters of a schema as JSON
MAX_DEPTH = 64  # of schemas in schemas, and of values in enum and const
MAX_SCHEMAS = 1024  # subschemas
MAX_COUNT = 2**31 - 1  # lengths and numbers of items

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")

# They say nothing about values: for people and for programs.
ANNOTATIONS = frozenset({"$schema", "$comment", "title", "description", "default", "examples", "deprecated", "readOnly",
                         "writeOnly", "contentEncoding", "contentMediaType", "contentSchema", "discriminator"})
_ONE = ("items", "additionalProperties")  # a schema
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")  # a list of schemas
_MAPS = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name


def checked_schema(schema: Any, where: str) -> Any:
    """The schema without its annotations, a copy. Raises GrammarError, which names the place at fault."""
    if not isinstance(schema, bool | dict):
        raise GrammarError(where, "must be a JSON schema: an object, or true or false")
    try:
        size = len(json.dumps(schema))
    except (ValueError, TypeError, RecursionError) as error:
        raise GrammarError(where, f"is not JSON: {error}") from None
    if size > MAX_SIZE:
        raise GrammarError(where, f"has {size} characters as JSON; at most {MAX_SIZE} are taken", "schema_too_big")
    return _Reader().schema(schema, where)


def subschemas(schema: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The schemas that stand directly in a schema, each with its place."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        place = step(where, key)
        if key in _ONE:
            yield place, value
        elif key in _LISTS:
            yield from ((step(place, index), item) for index, item in enumerate(value))
        elif key in _MAPS:
            yield from ((step(place, name), item) for name, item in value.items())


def closed(schema: Any) -> Any:
    """A checked schema in which an object that lists its properties has no others, unless it speaks of others.

    That is narrower than JSON Schema, and what those mean who ask for an object of such properties. Left as it is
    where several schemas hold of one value: there, one of them may list what another does not.
    """
    return schema if _is_composed(schema) else _closed(schema)


def _is_composed(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return False
    applied = schema.keys() & {"anyOf", "oneOf", "$ref"}
    besides = schema.keys() - {"$defs", "definitions", "$anchor"}
    return "allOf" in schema or bool(applied) and len(besides) > 1 or any(
        _is_composed(part) for _, part in subschemas(schema, ""))


def _closed(schema: Any) -> Any:
    result = _with_parts(schema, _closed)
    if isinstance(schema, dict) and "properties" in schema and not schema.keys() & {"additionalProperties",
                                                                                    "patternProperties"}:
        if set(schema.get("required", ())) <= schema["properties"].keys():
            result["additionalProperties"] = False
    return result


def moved(schema: Any, pointer: str) -> Any:
    """A checked schema as it must be where it stands at this JSON pointer in another: its own places are named anew."""
    result = _with_parts(schema, lambda part: moved(part, pointer))
    if isinstance(schema, dict) and schema.get("$ref", "no")[1:2] in ("", "/"):
        result["$ref"] = f"#{pointer}{schema['$ref'][1:]}"
    return result


def _with_parts(schema: Any, change: Callable[[Any], Any]) -> Any:
    """A copy, in which the schemas that stand directly in it are changed."""
    if not isinstance(schema, dict):
        return schema
    result = dict(schema)
    for key, value in schema.items():
        if key in _ONE:
            result[key] = change(value)
        elif key in _LISTS:
            result[key] = [change(item) for item in value]
        elif key in _MAPS:
            result[key] = {name: change(item) for name, item in value.items()}
    return result


def step(where: str, key: str | int) -> str:
    """The place below `where`; a name that is no plain one is quoted, and shortened."""
    if isinstance(key, int):
        return f"{where}[{key}]"
    if re.fullmatch(r"[\w$-]{1,64}", key):
        return f"{where}.{key}"
    return f"{where}[{json.dumps(key[:64], ensure_ascii=False)}]"


class _Reader:
    """Checks one schema, and counts what is in it."""

    def __init__(self) -> None:
        self._num_schemas = 0

    def schema(self, schema: Any, where: str, depth: int = 0) -> Any:
        """A copy, without annotations."""
        self._num_schemas += 1
        if self._num_schemas > MAX_SCHEMAS:
            raise GrammarError(where, f"is one schema too many: at most {MAX_SCHEMAS} are taken", "schema_too_big")
        if depth > MAX_DEPTH:
            raise GrammarError(where, f"is nested deeper than {MAX_DEPTH}", "schema_too_big")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise GrammarError(where, "must be a schema: an object, or true or false")
        checked: dict[str, Any] = {}
        for key, value in schema.items():
            place = step(where, key)
            if key in ANNOTATIONS or key == "$id" and depth == 0 or key == "uniqueItems" and value is False:
                continue
            checked[key] = self._keyword(key, value, place, depth)
        self._check_together(checked, where)
        return checked

    def _keyword(self, key: str, value: Any, where: str, depth: int) -> Any:
        if key in _ONE:
            return self.schema(value, where, depth + 1)
        if key in _LISTS:
            if not isinstance(value, list) or not value:
                raise GrammarError(where, "must be a list of schemas that is not empty")
            return [self.schema(item, step(where, index), depth + 1) for index, item in enumerate(value)]
        if key in _MAPS:
            if not isinstance(value, dict):
                raise GrammarError(where, "must be an object of schemas")
            return {name: self.schema(item, step(where, name), depth + 1) for name, item in value.items()}
        if key not in _VALUES:
            raise GrammarError(where, "is not supported: it cannot be guaranteed, so leave it out",
                               "unsupported_schema")
        is_right, what = _VALUES[key]
        if not is_right(value):
            raise GrammarError(where, f"must be {what}", "unsupported_schema" if key in ("format", "$ref") else
                               "invalid_value")
        return int(value) if _VALUES[key] is _COUNT else value

    def _check_together(self, schema: Mapping[str, Any], where: str) -> None:
        """What a keyword can only promise in the company of others."""
        if any(name in schema for name in ("minProperties", "maxProperties")) \
                and (schema.get("additionalProperties") is not False or "patternProperties" in schema):
            name = "minProperties" if "minProperties" in schema else "maxProperties"
            raise GrammarError(step(where, name), "is only supported where additionalProperties is false and there "
                               "are no patternProperties", "unsupported_schema")


def _is_count(value: Any) -> bool:
    return _is_number(value) and value == int(value) and 0 <= value <= MAX_COUNT


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_types(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return bool(names) and all(isinstance(name, str) and name in TYPES for name in names)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


_COUNT = (_is_count, f"a whole number from 0 to {MAX_COUNT}")
_NUMBER = (_is_number, "a number")
# What a keyword's value must be, and how to say so.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (_are_types, f"one of {', '.join(TYPES)}, or a list of those"),
    "enum": (lambda value: isinstance(value, list) and bool(value), "a list that is not empty"),
    "const": (lambda value: True, ""),
    "$ref": (lambda value: isinstance(value, str) and value.startswith("#"), "a place in the same schema: #/..."),
    "$anchor": (lambda value: isinstance(value, str), "a string"),
    "minLength": _COUNT, "maxLength": _COUNT, "minItems": _COUNT, "maxItems": _COUNT,
    "minProperties": _COUNT, "maxProperties": _COUNT,
    "pattern": (lambda value: isinstance(value, str), "a string"),
    "format": (lambda value: isinstance(value, str) and value in FORMATS, f"one of {', '.join(FORMATS)}"),
    "minimum": _NUMBER, "maximum": _NUMBER, "exclusiveMinimum": _NUMBER, "exclusiveMaximum": _NUMBER,
    "multipleOf": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "required": (_are_names, "a list of names"),
}
