"""Tools from Python: llm.chat(messages, tools=[...]) on the demo model."""

import json
from typing import Literal

import pytest

from llama import Llama, SamplingParams
from llama.engine.request import RequestError
from llama.text import grammar
from llama.text.functions import ToolError, call_function
from llama.text.grammar import GrammarError
from llama.text.tools import ToolCall

ASK = [{"role": "user", "content": "What is the weather in Zurich?"}]
HELLO = [{"role": "user", "content": "Hello"}]
GREEDY = SamplingParams(temperature=0, max_tokens=200)


def get_weather(city: str) -> str:
    """Get the weather for a city"""
    return "12 degrees"


def get_price(item: Literal["tea", "milk"]) -> int:
    """Get the price"""
    return 3


@pytest.fixture(scope="module")
def llm():
    return Llama.load()


def test_a_function_is_called_and_its_result_is_used(llm):
    answer = llm.chat(ASK, GREEDY, tools=[get_weather])
    [call] = answer.tool_calls
    assert call == ToolCall("get_weather", '{"city": "Zurich"}') and answer.text == ""
    function = {"name": call.name, "arguments": call.arguments}
    messages = [*ASK, {"role": "assistant", "tool_calls": [{"id": "1", "function": function}]},
                {"role": "tool", "tool_call_id": "1", "content": call_function(get_weather, call.arguments)}]
    answer = llm.chat(messages, GREEDY, tools=[get_weather])
    assert "12 degrees" in answer.text and answer.tool_calls == ()


def test_a_definition_is_the_same_as_the_function(llm):
    definition = {"type": "function", "function": {
        "name": "get_weather", "description": "Get the weather for a city", "parameters": {
            "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
            "additionalProperties": False}}}
    assert llm.chat(ASK, GREEDY, tools=[definition]).ids == llm.chat(ASK, GREEDY, tools=[get_weather]).ids
    assert llm.encode_chat(ASK, tools=[definition]) == llm.encode_chat(ASK, tools=[get_weather])


@pytest.mark.parametrize("choice", ["required", "get_price"])
def test_a_call_that_must_be_made(llm, choice):
    assert llm.chat(HELLO, GREEDY, tools=[get_weather, get_price]).tool_calls == ()
    answers = llm.chat(HELLO, SamplingParams(temperature=1.5, seed=1, n=4, max_tokens=200),
                       tools=[get_weather, get_price], tool_choice=choice)
    for answer in answers:
        assert answer.text == "" and answer.tool_calls
        for call in answer.tool_calls:
            assert choice == "required" or call.name == choice
            assert call.name != "get_price" or json.loads(call.arguments)["item"] in ("tea", "milk")


def test_tools_that_may_not_be_called_are_not_told_of(llm):
    assert llm.chat(ASK, GREEDY, tools=[get_weather], tool_choice="none").ids == llm.chat(ASK, GREEDY).ids


def test_a_grammar_in_the_parameters(llm):
    for written, pattern in ((grammar.choice(["yes", "no"]), ("yes", "no")), (grammar.regex("ab{2}c"), ("abbc",))):
        assert llm.chat(HELLO, SamplingParams(temperature=0, max_tokens=9, grammar=written)).text in pattern
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 7, "maximum": 7}}, "required": ["n"],
              "additionalProperties": False}
    params = SamplingParams(temperature=0, max_tokens=60, grammar=grammar.json_schema(schema))
    assert json.loads(llm.generate("Hello", params).text) == {"n": 7}
    assert "".join(delta.text for delta in llm.stream(HELLO, params)) == llm.chat(HELLO, params).text


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"tool_choice": "get_time", "tools": [get_weather]}, RequestError, "tool_choice must be auto, none, required or"),
    ({"tool_choice": "required"}, RequestError, "tool_choice is required, but there are no tools"),
    ({"tools": [lambda x: x]}, ToolError, "has no name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}], "tool_choice": "f"},
     GrammarError, r"tools\[0\].function.parameters.not is not supported")])
def test_what_cannot_be_says_why(llm, options, error, message):
    with pytest.raises(error, match=message):
        llm.chat(HELLO, GREEDY, **options)
