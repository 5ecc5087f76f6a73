"""Checks a conversation as callers write it, and makes it the plain data that chat templates expect.

The form is OpenAI's: {"role", "content", "name", "tool_calls", "tool_call_id"}. What comes out is a copy that
shares nothing with the caller's objects and holds only JSON's types.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llama.text.tokenizer import valid_text

ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
MAX_DEPTH = 64  # of nested JSON


class ChatError(ValueError):
    """A conversation that cannot be made a prompt. Names the field, or gives the template's own message."""


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as templates expect it.

    `content` is a string: text parts are joined with a newline, and null is "" (a tool's result may be an
    object). The role developer is system. Arguments of tool calls are objects: JSON in a string is parsed.
    Keys that are null, and an empty `tool_calls`, are left out; other keys are passed on to the template.
    Raises ChatError, which names the field as in `messages[3].content`.
    """
    if not _is_list(messages) or not messages:
        raise ChatError("messages must be a list that is not empty")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def normalize_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]] | None:
    """The tool definitions as plain data; None where there are none: templates mind []. Raises ChatError.

    `strict` is left out: it says how a call is read, or made, and is nothing that models were taught.
    """
    if tools is None:
        return None
    if not _is_list(tools):
        raise ChatError("tools must be a list of objects")
    for index, tool in enumerate(tools):
        _require(isinstance(tool, Mapping), f"tools[{index}]", "must be an object")
    plain = plain_json(tools, "tools")
    for tool in plain:
        if isinstance(tool.get("function"), dict):
            tool["function"].pop("strict", None)
    return plain or None


def one_call_each(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation with no more than one tool call in a message, each followed by its own result.

    The results are the tool messages that follow; each belongs to the call whose id it names, or, where no
    result names an id, to the call in its place. Results that belong to no call stay behind the last.
    """
    separated: list[dict[str, Any]] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            separated.append(message)
            continue
        results = []
        while position < len(messages) and messages[position]["role"] in ("tool", "ipython"):
            results.append(messages[position])
            position += 1
        by_id = any("tool_call_id" in result for result in results)
        for index, call in enumerate(calls):
            content = message["content"] if index == 0 else ""
            separated.append({**message, "content": content, "tool_calls": [call]})
            own = [r for r in results if _answers(r, call)] if by_id else results[:1]
            separated += own
            results = [r for r in results if not _answers(r, call)] if by_id else results[1:]
        separated += results
    return separated


def plain_json(value: Any, where: str, depth: int = MAX_DEPTH) -> Any:
    """A copy of JSON data, valid text in its strings. Raises ChatError, naming the place, on other data."""
    if isinstance(value, str):
        return valid_text(value)
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    _require(depth > 0, where, f"is nested deeper than {MAX_DEPTH}")
    if isinstance(value, Mapping):
        for key in value:
            _require(isinstance(key, str), where, f"has the key {key!r}, which is not a string")
        return {valid_text(k): plain_json(v, f"{where}.{k}", depth - 1) for k, v in value.items()}
    if _is_list(value):
        return [plain_json(item, f"{where}[{index}]", depth - 1) for index, item in enumerate(value)]
    raise ChatError(f"{where} is {_described(value)}, which JSON cannot hold")


def _message(message: Any, where: str) -> dict[str, Any]:
    _require(isinstance(message, Mapping), where, "must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise ChatError(f"{where}.role is {_described(role)}; it must be one of {', '.join(ROLES)}")
    calls = _tool_calls(message.get("tool_calls"), role, f"{where}.tool_calls")
    if "content" not in message and not calls:
        raise ChatError(f"{where}.content is missing")
    normalized = {
        "role": "system" if role == "developer" else role,
        "content": _content(message.get("content"), role, f"{where}.content"),
    }
    for key, value in message.items():
        if key not in ("role", "content", "tool_calls") and value is not None:
            if key in ("name", "tool_call_id"):
                _require(isinstance(value, str), f"{where}.{key}", "must be a string")
            normalized |= plain_json({key: value}, where)
    if calls:
        normalized["tool_calls"] = calls
    return normalized


def _content(content: Any, role: str, where: str) -> str | dict[str, Any]:
    if content is None:
        return ""
    if isinstance(content, str):
        return valid_text(content)
    if isinstance(content, Mapping) and role in ("tool", "ipython"):
        return plain_json(content, where)
    if not _is_list(content):
        raise ChatError(f"{where} is {_described(content)}; it must be a string, null or text parts")
    for index, part in enumerate(content):
        _require(isinstance(part, Mapping), f"{where}[{index}]", "must be an object with type and text")
        if part.get("type") != "text":
            described = _described(part.get("type"))
            raise ChatError(f"{where}[{index}].type is {described}; only 'text' is understood")
        _require(isinstance(part.get("text"), str), f"{where}[{index}].text", "must be a string")
    return "\n".join(valid_text(part["text"]) for part in content)


def _tool_calls(calls: Any, role: str, where: str) -> list[dict[str, Any]]:
    if calls is None or (_is_list(calls) and not calls):
        return []
    _require(_is_list(calls), where, "must be a list of objects")
    _require(role == "assistant", where, "may only stand in a message of the assistant")
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    _require(isinstance(call, Mapping), where, "must be an object with function")
    if call.get("type", "function") != "function":
        raise ChatError(f"{where}.type is {_described(call['type'])}; it must be 'function'")
    function = call.get("function")
    _require(isinstance(function, Mapping), f"{where}.function", "must be an object with name and arguments")
    _require(isinstance(function.get("name"), str), f"{where}.function.name", "must be a string")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    return plain_json({**call, "function": {**function, "arguments": arguments}}, where)


def _arguments(arguments: Any, where: str) -> Mapping[str, Any]:
    """Arguments as an object: left as the JSON string of the wire, they would be encoded a second time."""
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            raise ChatError(f"{where} is not JSON: {error}") from error
    _require(isinstance(arguments, Mapping), where, "must be a JSON object")
    return arguments


def _answers(result: Mapping[str, Any], call: Mapping[str, Any]) -> bool:
    return "tool_call_id" in result and result["tool_call_id"] == call.get("id")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _described(value: Any) -> str:
    """A value for an error message: a string's beginning, null, or the type."""
    if value is None:
        return "null"
    return repr(value[:40]) if isinstance(value, str) else f"of type {type(value).__name__}"


def _require(condition: bool, where: str, what: str) -> None:
    if not condition:
        raise ChatError(f"{where} {what}")
