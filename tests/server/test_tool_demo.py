"""Tools with a model that calls them: the demo checkpoint, from request to reply, its result, and the answer."""

import json
from typing import Any

import pytest

from llama.runtime import Llama
from server.protocol import Rendering, Served, parse_chat
from tests.server.samples import chat_body

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Get the weather for a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
ASK = {"role": "user", "content": "What is the weather in Zurich?"}


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama.load()


def answered(llm: Llama, *messages: dict, **fields: Any) -> tuple[list[dict], dict]:
    """The chunks of a greedy answer, and its one choice folded from them."""
    served = Served(("demo",), "demo", llm.tokenizer, llm.template, llm.config, llm.defaults,
                    llm.config.eos_token_ids, llm.config.max_position_embeddings, 0)
    call = parse_chat(chat_body(messages=messages, tools=[WEATHER], temperature=0, **fields), served)
    rendering = Rendering(call, served)
    chunks = rendering.opening()
    for delta in llm.stream(call.prompts[0], call.params):
        chunks += rendering.delta(0, delta) if delta.ids else []
    [choice] = rendering.reply([*chunks, *rendering.closing()])["choices"]
    return chunks, choice


def test_a_call_its_result_and_the_answer(llm):
    chunks, choice = answered(llm, ASK)
    message = choice["message"]
    [made] = message["tool_calls"]
    assert made["function"]["name"] == "get_weather"
    assert json.loads(made["function"]["arguments"]) == {"city": "Zurich"}
    assert (message["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert [list(chunk["choices"][0]["delta"]) for chunk in chunks] == [
        ["role"], ["tool_calls"], ["tool_calls"], ["content"]]
    _, choice = answered(llm, ASK, message, {"role": "tool", "tool_call_id": made["id"], "content": "12 degrees"})
    assert "12 degrees" in choice["message"]["content"] and choice["message"]["tool_calls"] == []
    assert choice["finish_reason"] == "stop"


def test_a_call_that_the_limit_cuts(llm):
    _, choice = answered(llm, ASK, max_tokens=8)
    assert choice["message"]["content"].startswith('{"name": "get') and choice["message"]["tool_calls"] == []
    assert choice["finish_reason"] == "length"


def test_tools_that_are_hidden_are_not_called(llm):
    _, choice = answered(llm, ASK, tool_choice="none")
    assert choice["message"]["tool_calls"] == [] and choice["message"]["content"]
