"""Calls of tools as a grammar, so that one is made, and made right: the reply is what `CertainCallStream` reads.

    {"name": NAME, "parameters": {...}}; {"name": NAME, "parameters": {...}}

That is how the chat template of Llama 3.1 writes a call, to the space. The parameters satisfy the tool's schema.
Where the reply may also be JSON of another kind, there is one call at most, and space as in any JSON.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llama.text.grammar import COMPACT, FLEXIBLE, HEADER, GrammarError, checked, quoted, rules_of_json
from llama.text.schema import moved

SEPARATOR = "; "
MAX_CALLS = 16  # in one reply

# What the built-in tools take, of which requests only have the name.
_TAKEN = {"brave_search": "query", "wolfram_alpha": "query", "code_interpreter": "code"}
_BUILTIN = {name: {"type": "object", "properties": {parameter: {"type": "string"}}, "required": [parameter],
                   "additionalProperties": False} for name, parameter in _TAKEN.items()}
_NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
_ANYTHING = {"type": "object"}


def calls(tools: Sequence[Mapping[str, Any]], where: Sequence[str], *, most: int = MAX_CALLS, must_call: bool = True,
          only_strict: bool = False) -> str:
    """Up to `most` calls of these tools, OpenAI's; unless `must_call`, or a text that does not begin like a call.

    where: what the caller calls the tools. only_strict: schemas are followed where `strict` says so; the
    parameters of other tools are any object. Raises GrammarError.
    """
    rules = [f"start: {'calls' if must_call else 'calls | text'}", f"text: /{_other_than_a_call()}/",
             f"calls: call ({quoted(SEPARATOR)} call){{0,{most - 1}}}" if most > 1 else "calls: call",
             f"call: {' | '.join(f'call{number}' for number in range(len(tools)))}"]
    for number, (tool, place) in enumerate(zip(tools, where, strict=True)):
        schema, place = _parameters(tool["function"], place, only_strict)
        opening = f'{{"name": {_name(tool)}, "parameters": '
        rules += [f"call{number}: {quoted(opening)} parameters{number} {quoted('}')}",
                  f"parameters{number}: {rules_of_json(schema, place, COMPACT)}"]
    return checked(HEADER + "\n".join(rules), "tools")


def call_or_json(tools: Sequence[Mapping[str, Any]], where: Sequence[str], content: Any, content_where: str) -> str:
    """One call of these tools, or a JSON value that satisfies the schema `content`. Raises GrammarError.

    Schemas are followed where `strict` says so. The two are one schema: a reader that goes on letter by letter
    does not have to know at the first brace which of them it is.
    """
    options = []
    for number, (tool, place) in enumerate(zip(tools, where, strict=True)):
        schema, place = _parameters(tool["function"], place, only_strict=True)
        rules_of_json(schema, place, FLEXIBLE)
        parameters = moved(schema, f"/anyOf/{number}/properties/parameters")
        properties = {"name": {"const": tool["function"]["name"]}, "parameters": parameters}
        options.append({"type": "object", "properties": properties, "required": list(properties),
                        "additionalProperties": False})
    rules_of_json(content, content_where, FLEXIBLE)
    either = {"anyOf": [*options, moved(content, f"/anyOf/{len(options)}")]}
    return checked(f"{HEADER}start: {rules_of_json(either, content_where, FLEXIBLE)}", content_where)


def beginning(tool_name: str) -> tuple[str, ...]:
    """What a call begins with, up to its parameters: between these parts there may be space."""
    return ("{", '"name"', ":", json.dumps(tool_name, ensure_ascii=False), ",", '"parameters"', ":")


def _name(tool: Mapping[str, Any]) -> str:
    return json.dumps(tool["function"]["name"], ensure_ascii=False)


def _parameters(function: Mapping[str, Any], where: str, only_strict: bool) -> tuple[Any, str]:
    """The schema that a call's parameters follow, an object's, and its place."""
    where = f"{where}.function.parameters"
    if only_strict and not function.get("strict"):
        return _ANYTHING, where
    schema = function.get("parameters")
    if schema is None:
        return _BUILTIN.get(function["name"], _NOTHING), where
    if isinstance(schema, dict) and schema.get("type", "object") != "object":
        raise GrammarError(f"{where}.type", "must be object: a call has its parameters by name")
    return ({"type": "object", **schema} if isinstance(schema, dict) else schema), where


def _other_than_a_call() -> str:
    """A regular expression for the texts that do not begin like a call, with or without space in it."""
    pattern = ""
    for part in reversed(('{', '"name"', ":", '"')):
        for place, letter in reversed(list(enumerate(part))):
            space, letter = r" \t\n\r" if place == 0 else "", f"\\x{ord(letter):02x}"
            goes_on = f"|{letter}{pattern}" if pattern else ""
            pattern = (f"[{space}]*" if space else "") + f"([^{space}{letter}](.|\\n)*{goes_on})?"
    return pattern
