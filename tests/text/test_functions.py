"""Functions as tools: schemas that jsonschema holds to what the functions take, and calls that never raise."""

import enum
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Optional, Union

import jsonschema
import pytest

from llama.text import grammar
from llama.text.functions import ToolError, call_function, tool_schema


class Color(str, enum.Enum):
    RED = "red"
    BLUE = "blue"


def weather(city: str, days: int = 1, unit: Literal["C", "F"] = "C") -> str:
    """Get the weather
    for a city.

    More that the model need not know.

    Args:
        city: where,
            in any language
        days (int): how many

    Returns:
        str: not a parameter
    """
    return f"{city} {days} {unit}"


def test_a_schema_is_what_signature_and_docstring_say():
    assert tool_schema(weather) == {"type": "function", "function": {
        "name": "weather", "description": "Get the weather for a city.", "parameters": {
            "type": "object", "properties": {
                "city": {"type": "string", "description": "where, in any language"},
                "days": {"type": "integer", "description": "how many"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"], "additionalProperties": False}}}


@pytest.mark.parametrize(("annotation", "taken", "refused"), [
    (str, ["a"], [1]), (int, [1, -2], ["1", 1.5, None]), (float, [1, 1.5], ["1"]), (bool, [True], [0]),
    (None, [None], [0]), (list, [[1, "a"]], [{}]), (dict, [{"a": 1}], [[]]), (list[int], [[], [1]], [["a"], 1]),
    (dict[str, int], [{}, {"a": 1}], [{"a": "b"}, []]), (Optional[int], [None, 1], ["a"]), (int | str, [1, "a"], [None]),
    (Union[int, None, list[str]], [1, None, ["a"]], [[1]]), (Literal["a", 1], ["a", 1], ["b"]),
    (Color, ["red"], ["green"]), (Any, [1, "a", None, []], []), (Sequence[str], [["a"]], ["a"]),
    (Mapping[str, list[int]], [{"a": [1]}], [{"a": 1}]), ("list[int]", [[1]], [["a"]])])
def test_a_parameter_takes_what_its_annotation_says(annotation, taken, refused):
    def function(x):
        pass

    function.__annotations__ = {"x": annotation}
    schema = tool_schema(function)["function"]["parameters"]
    validator = jsonschema.Draft202012Validator(schema)
    assert all(validator.is_valid({"x": value}) for value in taken)
    assert not any(validator.is_valid(value) for value in [*({"x": value} for value in refused), {}, {"x": 1, "y": 1}])
    assert grammar.json_schema(schema)  # such a call can be made by a grammar


def test_a_definition_stays_as_it_is():
    definition = {"type": "function", "function": {"name": "f"}}
    assert tool_schema(definition) == definition


def _positional(a: int, /):
    pass


def _many(*a: int):
    pass


def _bare(a):
    pass


def _strange(a: bytes):
    pass


def _unknown(a: "Nowhere"):  # noqa: F821
    pass


@pytest.mark.parametrize(("function", "message"), [
    (_positional, "_positional: the parameter a has no name by which a call could give it"),
    (_many, "_many: the parameter a has no name"), (_bare, "_bare: the parameter a has no annotation; write its type"),
    (_strange, "_strange: the parameter a has the annotation <class 'bytes'>, which is no type that JSON can hold"),
    (_unknown, "the annotations of _unknown cannot be read: name 'Nowhere' is not defined"),
    (lambda: 1, "has no name of 1 to 64 letters"), (1, "a tool must be a function or a definition")])
def test_what_cannot_be_a_tool_says_why(function, message):
    with pytest.raises(ToolError, match=message.replace("(", r"\(")):
        tool_schema(function)


def test_a_call_is_answered_with_the_result_or_with_what_was_raised():
    def broken(a: int):
        return {"half": 1 / a}

    assert call_function(weather, '{"city": "Bern", "days": 2}') == "Bern 2 C"
    assert call_function(broken, '{"a": 2}') == '{"half": 0.5}'
    assert call_function(broken, '{"a": 0}') == "ZeroDivisionError: division by zero"
    assert call_function(broken, '{"b": 0}') == "TypeError: missing a required argument: 'a'"
    assert call_function(lambda: object(), "{}").startswith("TypeError: Object of type object is not JSON")


def test_somebody_who_stops_a_call_is_heard():
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_function(stopped, "{}")
