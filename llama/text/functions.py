"""Python functions as tools: what a model must know to call one, read from its signature and docstring."""

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", list: "array",
          tuple: "array", dict: "object"}
_ENTRY = re.compile(r"\s*\*{0,2}(\w+)(?:\s*\([^)]*\))?\s*:\s*(.*)")  # "name: text", also "name (str): text"


class ToolError(ValueError):
    """A function that cannot be a tool as it is, or a call that it does not take."""


def tool_schema(function: Callable[..., Any] | Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's definition of a tool, for a function; a definition stays as it is.

    The name is the function's, the description its docstring's first paragraph; what stands under "Args:"
    describes the parameters. Each has an annotation: str, int, float, bool, None, Literal, an Enum, list[...],
    dict[str, ...], or a union of those. Raises ToolError, naming the parameter.
    """
    if isinstance(function, Mapping):
        return dict(function)
    if not callable(function):
        raise ToolError(f"a tool must be a function or a definition with type and function, not {function!r}")
    name = function_name(function)
    try:
        annotations = typing.get_type_hints(function)
    except Exception as error:  # whatever an annotation in quotes is made of
        raise ToolError(f"the annotations of {name} cannot be read: {error}") from error
    description, described = _read_docstring(inspect.getdoc(function) or "")
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        where = f"{name}: the parameter {parameter.name}"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ToolError(f"{where} has no name by which a call could give it")
        if parameter.name not in annotations:
            raise ToolError(f"{where} has no annotation; write its type")
        schema = _schema(annotations[parameter.name], where)
        if parameter.name in described:
            schema["description"] = described[parameter.name]
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def function_name(function: Callable[..., Any]) -> str:
    """What a function is called by. Raises ToolError."""
    name = getattr(function, "__name__", "")
    if not re.fullmatch("[a-zA-Z0-9_-]{1,64}", name):
        raise ToolError(f"{function!r} has no name of 1 to 64 letters, digits, _ and -; define it with def")
    return name


def call_function(function: Callable[..., Any], arguments: str) -> str:
    """What a tool's function makes of a call's arguments, a JSON object: its result as text, or what it raised.

    Whatever the function raises is its answer; but KeyboardInterrupt and SystemExit go through.
    """
    try:
        bound = inspect.signature(function).bind(**json.loads(arguments))
        result = function(*bound.args, **bound.kwargs)
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _schema(annotation: Any, where: str) -> dict[str, Any]:
    """A type as a JSON schema."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _PLAIN:
        return {"type": _PLAIN[annotation]}
    if annotation is Any:
        return {}
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum) and issubclass(annotation, str):
        return {"enum": [member.value for member in annotation]}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_schema(kind, where) for kind in inner]}
    if origin in (list, Sequence):
        return {"type": "array", "items": _schema(inner[0], where)}
    if origin in (dict, Mapping) and inner[0] is str:
        return {"type": "object", "additionalProperties": _schema(inner[1], where)}
    raise ToolError(f"{where} has the annotation {annotation!r}, which is no type that JSON can hold")


def _read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """A docstring's first paragraph, and what it says of each parameter under "Args:"."""
    head, _, rest = text.partition("\nArgs:\n")
    described: dict[str, str] = {}
    name = None
    for line in rest.splitlines():
        if not line.startswith(" "):
            break
        if found := _ENTRY.fullmatch(line):
            name = found[1]
            described[name] = found[2]
        elif name is not None:
            described[name] += f" {line.strip()}"
    return " ".join(head.strip().partition("\n\n")[0].split()), described
