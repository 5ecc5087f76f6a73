"""A checkpoint's settings out of its JSON files, strictly: what is repeated, missing or of another kind is refused.

Imports neither torch nor anything else of the project.
"""

import json
import math
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A checkpoint's configuration asks for something that this code does not compute, or lacks something."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError that names the file."""
    try:
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=_without_repetition)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a repeated key, an endless integer
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, of which no key may stand twice: readers disagree on which one counts."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"the key {name!r} stands twice in one object")
        fields[name] = value
    return fields


def read_token_ids(raw: dict[str, Any], name: str) -> tuple[int, ...]:
    """A field that holds one token id, a list of them, or null, as a tuple."""
    value = raw.get(name)
    values = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in values):
        raise ConfigError(f"{name} must be a token id or a list of them, not {value!r}")
    return tuple(values)


_REQUIRED = object()


def read_number(raw: dict[str, Any], name: str, kind: type, default: Any = _REQUIRED) -> Any:
    """A finite number of the given kind, int or float; an absent or null one takes the default, if there is one."""
    value = raw.get(name)
    if value is None:
        if default is _REQUIRED:
            raise ConfigError(f"{name} is missing")
        return default
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if not whole and not (kind is float and isinstance(value, float) and math.isfinite(value)):
        raise ConfigError(f"{name} must be {'an integer' if kind is int else 'a finite number'}, not {value!r}")
    return kind(value)


def read_flag(raw: dict[str, Any], name: str) -> bool:
    """true or false; an absent one is false."""
    value = raw.get(name, False)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, not {value!r}")
    return value
