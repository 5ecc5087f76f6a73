"""Tools and structured output over HTTP on the demo model, as the openai package and LangChain ask for them."""

import json
from typing import Literal

import jsonschema
import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

from tests.server.clients import COMPLETION, KEY, NAME, Server
from tests.server.test_openai_client import client

WEATHER = {"type": "function", "function": {
    "name": "get_weather", "description": "Get the weather for a city", "strict": True,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
                   "additionalProperties": False}}}
PRICE = {"type": "function", "function": {
    "name": "get_price", "description": "Get the price",
    "parameters": {"type": "object", "properties": {"item": {"type": "string", "maxLength": 20},
                                                    "currency": {"enum": ["CHF", "EUR"]}},
                   "required": ["item", "currency"], "additionalProperties": False}}}
ASK = [{"role": "user", "content": "What is the weather in Zurich?"}]
HELLO = [{"role": "user", "content": "Hello"}]  # to which the model by itself greets
BASE = {"model": NAME, "temperature": 0, "max_tokens": 200}


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=12)
    age: int = Field(ge=18, le=30)
    role: Literal["admin", "guest"]


@pytest.fixture(scope="module")
def api(demo: Server):
    with client(demo) as made:
        yield made


def both(api: openai.OpenAI, **fields):
    """The one choice of an answer, the same whether it is streamed or not; and the chunks of the stream."""
    whole = api.chat.completions.create(**BASE, **fields).choices[0]
    with api.chat.completions.stream(**BASE, **fields) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        folded = stream.get_final_completion().choices[0]
    assert (whole.message.content or "") == (folded.message.content or "")
    assert whole.finish_reason == folded.finish_reason
    assert [(each.function.name, each.function.arguments) for each in whole.message.tool_calls or ()] == \
        [(each.function.name, each.function.arguments) for each in folded.message.tool_calls or ()]
    return whole, chunks


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_its_result_and_the_answer(api, choice):
    answer, _ = both(api, messages=ASK, tools=[WEATHER], tool_choice=choice)
    [call] = answer.message.tool_calls
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Zurich"})
    messages = [*ASK, answer.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}]
    answer, _ = both(api, messages=messages, tools=[WEATHER])
    assert "12 degrees" in answer.message.content and not answer.message.tool_calls


def test_a_call_is_made_where_the_model_alone_would_make_none(api):
    tools = [WEATHER, PRICE]
    assert both(api, messages=HELLO, tools=tools)[0].message.tool_calls == []
    assert both(api, messages=ASK, tools=tools, tool_choice="none")[0].message.tool_calls == []
    for choice in ("required", {"type": "function", "function": {"name": "get_price"}}):
        answer, chunks = both(api, messages=HELLO, tools=tools, tool_choice=choice)
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        for call in answer.message.tool_calls:
            schema = next(each["function"] for each in tools if each["function"]["name"] == call.function.name)
            jsonschema.validate(json.loads(call.function.arguments), schema["parameters"])
        pieces = [each.choices[0].delta.tool_calls[0] for each in chunks if each.choices and each.choices[0].delta.tool_calls]
        assert pieces[0].function.name and pieces[0].id and pieces[0].function.arguments == ""
        assert len(pieces) > 4 and not any(piece.id or piece.function.name for piece in pieces[1:5])
    assert call.function.name == "get_price"


def test_many_draws_satisfy_the_schema(api):
    fields = {"messages": HELLO, "tools": [PRICE], "tool_choice": "required", "parallel_tool_calls": False, "n": 8}
    reply = api.chat.completions.create(**{**BASE, "temperature": 2, "seed": 1}, **fields)
    for choice in reply.choices:
        [call] = choice.message.tool_calls
        jsonschema.validate(json.loads(call.function.arguments), PRICE["function"]["parameters"])
    assert len({choice.message.tool_calls[0].function.arguments for choice in reply.choices}) > 1


def test_a_reply_that_satisfies_a_schema(api):
    reply = api.chat.completions.parse(**BASE, messages=HELLO, response_format=Person)
    assert isinstance(reply.choices[0].message.parsed, Person)
    with api.chat.completions.stream(**BASE, messages=HELLO, response_format=Person) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == reply.choices[0].message.parsed
    answer, _ = both(api, messages=HELLO, response_format={"type": "json_object"}, seed=3)
    assert answer.message.content.startswith("{")
    assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)


def test_what_vllms_users_ask_for(api):
    def answer(**body):
        return api.chat.completions.create(**BASE, messages=HELLO, extra_body=body).choices[0].message.content

    assert answer(guided_choice=["positive", "negative"]) in ("positive", "negative")
    assert len(answer(guided_regex="[0-9]{4}-[0-9]{2}")) == 7
    assert answer(guided_grammar='start: "x" ("y" | "z")') in ("xy", "xz")
    Person.model_validate_json(answer(guided_json=Person.model_json_schema()))
    continued = api.completions.create(model=NAME, prompt="Hello", temperature=0, extra_body={"guided_regex": "[a-c]{5}"})
    assert len(continued.choices[0].text) == 5 and set(continued.choices[0].text) <= set("abc")


def test_log_probabilities_are_those_of_what_the_model_would_have_said(api):
    fields = {"logprobs": True, "top_logprobs": 2}
    free = api.chat.completions.create(**BASE, messages=HELLO, **fields).choices[0].logprobs.content[0]
    held = api.chat.completions.create(**BASE, messages=HELLO, **fields, extra_body={"guided_choice": ["zzz"]})
    first = held.choices[0].logprobs.content[0]
    assert first.top_logprobs[0].token == free.token and first.token != free.token
    assert first.top_logprobs[0].logprob == pytest.approx(free.logprob, abs=1e-4) and first.logprob < free.logprob


def test_what_cannot_be_followed_is_400_and_the_server_goes_on(demo, api):
    for body, param in (({"guided_regex": "("}, "guided_regex"), ({"guided_json": {"not": {}}}, "guided_json.not"),
                        ({"guided_json": {"type": "array", "maxItems": "x"}}, "guided_json.maxItems")):
        with pytest.raises(openai.BadRequestError) as caught:
            api.chat.completions.create(**BASE, messages=HELLO, extra_body=body)
        assert caught.value.param == param
    hard = {"prompt": "x", "guided_regex": "(.*a.{300}b)*c.*(d.{300}e)*" * 3, "max_tokens": 40}
    assert demo.post(COMPLETION, hard).status in (200, 400)
    assert demo.post(COMPLETION, {"prompt": "Hello", "max_tokens": 1}).status == 200


# ---- LangChain -------------------------------------------------------------------------------------------


@tool
def get_weather(city: str) -> str:
    """Get the weather for a city"""
    return "12 degrees"


@pytest.fixture
def chain(demo: Server) -> ChatOpenAI:
    return ChatOpenAI(model=NAME, base_url=f"{demo.url}/v1", api_key=KEY, temperature=0, max_retries=0, max_tokens=200)


@pytest.mark.parametrize("choice", [None, "auto", "any", "get_weather"])
def test_bind_tools(chain, choice):
    bound = chain.bind_tools([get_weather], tool_choice=choice)
    reply = bound.invoke(ASK[0]["content"])
    [call] = reply.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Zurich"})
    chunks = list(bound.stream(ASK[0]["content"]))
    assert [(each["name"], each["args"]) for each in sum(chunks[1:], chunks[0]).tool_calls] == [(call["name"], call["args"])]
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    answer = chain.bind_tools([get_weather]).invoke([HumanMessage(ASK[0]["content"]), reply, result])
    assert "12 degrees" in answer.content


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # LangChain keeps what the openai package has parsed
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_with_structured_output(chain, method):
    assert isinstance(chain.with_structured_output(Person, method=method).invoke("Hello"), Person)
    *_, last = chain.with_structured_output(Person, method=method).stream("Hello")
    assert isinstance(last, Person)
