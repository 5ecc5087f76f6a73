"""What a reply must be, out of a request's fields: response_format, guided_*, and what tool_choice asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama.text import grammar
from llama.text.grammar import GrammarError
from llama.text.toolgrammar import MAX_CALLS, call_or_json, calls
from server.errors import ApiError

_GUIDED = {"guided_json": grammar.json_schema, "guided_regex": grammar.regex, "guided_choice": grammar.choice,
           "guided_grammar": grammar.lark}


@dataclass(frozen=True)
class Constraint:
    """grammar: of the reply, None if it may be anything. field: which field of the request asks for it.
    makes_calls: whether calls of tools are made by the grammar, and so are certain from their beginning."""

    grammar: str | None = None
    field: str | None = None
    makes_calls: bool = False


def read_constraint(values: Mapping[str, Any], tools: Sequence[Mapping[str, Any]] = ()) -> Constraint:
    """What a request asks its reply to be. tools: those that may be called. Raises ApiError."""
    field = _content_field(values)
    try:
        if tools:
            return _of_calls(values, tools, field)
        return Constraint(_of_content(values, field), field)
    except GrammarError as error:
        param = field or "tools" if error.code == "extra_not_installed" else error.where
        raise ApiError(400, str(error), param=param, code=error.code) from None


def called_tools(values: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The tools that a reply may call. Raises ApiError."""
    choice, tools = values["tool_choice"], values["tools"] or ()
    if choice == "none":
        return ()
    if not isinstance(choice, dict):
        return tools
    name = choice["function"]["name"]
    chosen = [tool for tool in tools if tool["function"]["name"] == name]
    if not chosen:
        raise ApiError(400, f"tool_choice.function.name is {name!r}, which is none of the tools",
                       param="tool_choice.function.name", code="invalid_value")
    return chosen[:1]


def _content_field(values: Mapping[str, Any]) -> str | None:
    """Which field says what the text must be; one may. Raises ApiError."""
    given = [name for name in _GUIDED if values[name] is not None]
    if values["response_format"] is not None and values["response_format"]["type"] != "text":
        given.insert(0, "response_format")
    if len(given) > 1:
        raise ApiError(400, f"{given[1]} does not go with {given[0]}: give one of them", param=given[1],
                       code="invalid_value")
    return given[0] if given else None


def _of_content(values: Mapping[str, Any], field: str | None) -> str | None:
    """The grammar that a field asks for. Raises GrammarError, ApiError."""
    if field is None:
        return None
    if field == "response_format":
        return grammar.json_schema(*_format_schema(values["response_format"]))
    return _GUIDED[field](values[field], field)


def _format_schema(response_format: Mapping[str, Any]) -> tuple[Any, str]:
    """The schema of a response_format, and its place. Raises ApiError."""
    if response_format["type"] == "json_object":
        return {"type": "object"}, "response_format"
    if "json_schema" not in response_format:
        raise ApiError(400, "response_format.json_schema is missing", param="response_format.json_schema",
                       code="missing_required_parameter")
    return response_format["json_schema"]["schema"], "response_format.json_schema.schema"


def _of_calls(values: Mapping[str, Any], tools: Sequence[Mapping[str, Any]], field: str | None) -> Constraint:
    """The constraint where there are tools. Raises GrammarError, ApiError.

    Left to itself, a model calls tools in any of its forms, or answers with any text. It is held to one form
    where something is promised: that there is a call, that there is but one, what its parameters are, or what
    the text is.
    """
    if field is not None and field != "response_format":
        raise ApiError(400, f'{field} says what the whole reply is, and tools are no part of it: set tool_choice to '
                       '"none", or leave it out', param=field, code="invalid_value")
    choice, is_single = values["tool_choice"], values["parallel_tool_calls"] is False
    must_call = choice == "required" or isinstance(choice, dict)
    if not (must_call or is_single or field or any(tool["function"].get("strict") for tool in tools)):
        return Constraint()
    places = {id(tool): f"tools[{index}]" for index, tool in enumerate(values["tools"])}
    where = [places[id(tool)] for tool in tools]
    if field and not must_call:
        written = call_or_json(tools, where, *_format_schema(values["response_format"]))
        return Constraint(written, field, makes_calls=True)
    most = 1 if is_single or isinstance(choice, dict) else MAX_CALLS
    written = calls(tools, where, most=most, must_call=must_call, only_strict=not must_call)
    return Constraint(written, "tool_choice" if must_call else "tools", makes_calls=True)
