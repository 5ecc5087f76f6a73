"""What requests ask a reply to be: the grammar that comes of it, and what is refused, each with its place."""

import json
import random
import sys

import jsonschema
import pytest

from llama.text.matcher import GrammarCompiler
from server.protocol import Rendering, parse_chat, parse_completion
from tests.server.samples import EOT, answer, chat_body, completion_body, make_served, refused
from tests.text.walks import accepts, walk

SERVED = make_served()
PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}},
          "required": ["name", "age"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add", "parameters": {
             "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"],
             "additionalProperties": False}}},
         {"type": "function", "function": {"name": "now", "description": "The time"}}]
STRICT = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
ADD, NOW = '{"name": "add", "parameters": {"a": 1, "b": 2}}', '{"name": "now", "parameters": {}}'
WRONG = '{"name": "add", "parameters": {"a": 1}}'
NAMED = {"type": "function", "function": {"name": "add"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
BOB = '{"name": "Bob", "age": 3}'


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(SERVED.tokenizer, (EOT,))


# fields, the field that is named if the grammar fails later, texts of the language, and others
CHAT = [
    ({"response_format": FORMAT}, "response_format", [BOB], ['{"name": "Bob"}', "Hi", ADD]),
    ({"response_format": {"type": "json_object"}}, "response_format", [BOB, "{}", ADD], ["[]", "Hi"]),
    ({"guided_json": PERSON}, "guided_json", [BOB], ["{}"]),
    ({"guided_json": json.dumps(PERSON)}, "guided_json", [BOB], ["{}"]),
    ({"guided_regex": "[0-9]{3}"}, "guided_regex", ["123"], ["12", "abc"]),
    ({"guided_choice": ["yes", "no"]}, "guided_choice", ["yes", "no"], ["y", "yes no"]),
    ({"guided_grammar": 'start: "a"+'}, "guided_grammar", ["a", "aaa"], ["", "b"]),
    ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice", [ADD, NOW, f"{ADD}; {NOW}"], ["Hi", WRONG]),
    ({"tools": TOOLS, "tool_choice": NAMED}, "tool_choice", [ADD], [NOW, f"{ADD}; {ADD}", WRONG, "Hi"]),
    ({"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}, "tool_choice", [ADD, NOW],
     [f"{ADD}; {NOW}"]),
    ({"tools": TOOLS, "tool_choice": "required", "response_format": FORMAT}, "tool_choice", [ADD], [BOB]),
    ({"tools": TOOLS, "parallel_tool_calls": False}, "tools", [ADD, WRONG, "Hi", "{}", ""], [f"{ADD}; {NOW}"]),
    ({"tools": STRICT}, "tools", [ADD, NOW, f"{ADD}; {ADD}", "Hi"], [WRONG]),
    ({"tools": STRICT, "response_format": FORMAT}, "response_format", [ADD, NOW, BOB], ["Hi", WRONG]),
    ({"tools": TOOLS, "tool_choice": "none", "response_format": FORMAT}, "response_format", [BOB], [ADD, "Hi"]),
    ({"tools": TOOLS, "tool_choice": "none", "guided_choice": ["x"]}, "guided_choice", ["x"], [ADD]),
]


@pytest.mark.parametrize("number", range(len(CHAT)))
def test_what_a_reply_may_be(compiler, number):
    fields, field, inside, outside = CHAT[number]
    call = parse_chat(chat_body(**fields), SERVED)
    assert call.constraint.field == field and call.params.grammar == call.constraint.grammar
    assert [text for text in inside if not accepts(compiler, SERVED.tokenizer, call.params.grammar, text)] == []
    assert [text for text in outside if accepts(compiler, SERVED.tokenizer, call.params.grammar, text)] == []


@pytest.mark.parametrize("fields", [
    {}, {"response_format": {"type": "text"}}, {"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "auto"},
    {"tools": TOOLS, "parallel_tool_calls": True}, {"tools": STRICT, "tool_choice": "none"}])
def test_where_nothing_is_promised_a_reply_may_be_anything(fields):
    call = parse_chat(chat_body(**fields), SERVED)
    assert call.params.grammar is None and not call.constraint.makes_calls


@pytest.mark.parametrize(("field", "value"), [(field, value) for fields, *_ in CHAT[:7] for field, value in fields.items()])
def test_completions_take_them_too(field, value):
    written = parse_chat(chat_body(**{field: value}), SERVED).params.grammar
    call = parse_completion(completion_body(**{field: value}), SERVED)
    assert call.params.grammar == written is not None and call.constraint.field == field


def tool(**schema):
    return [TOOLS[1], {"type": "function", "function": {"name": "f", "parameters": schema}}]


@pytest.mark.parametrize(("fields", "param", "message"), [
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "is missing"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {
        "a": {"uniqueItems": True}}}}}}, "response_format.json_schema.schema.properties.a.uniqueItems", "is not supported"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70_000]}}}},
     "response_format.json_schema.schema", "at most 65536"),
    ({"guided_json": {"type": "x"}}, "guided_json.type", "must be one of null"),
    ({"guided_json": '{"type":'}, "guided_json", "must be an object"),
    ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
    ({"guided_grammar": "start: x"}, "guided_grammar", "unknown name"),
    ({"guided_choice": [""]}, "guided_choice[0]", "not empty"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "does not go with guided_regex"),
    ({"guided_json": {}, "response_format": {"type": "json_object"}}, "guided_json", "does not go with response_format"),
    ({"guided_regex": "a", "tools": TOOLS}, "guided_regex", "tools are no part of it"),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "does not go with a grammar"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice.function.name",
     "none of the tools"),
    ({"tools": tool(type="object", properties={"a": {"not": {}}}), "tool_choice": "required"},
     "tools[1].function.parameters.properties.a.not", "is not supported"),
    ({"tools": tool(type="string"), "tool_choice": "required"}, "tools[1].function.parameters.type", "must be object"),
    ({"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"minItems": "a"}}}]},
     "tools[0].function.parameters.minItems", "must be a whole number"),
])  # fmt: skip
def test_a_refusal_names_the_place(fields, param, message):
    error = refused(parse_chat, chat_body(**fields))
    assert (error.status, error.param) == (400, param), error.message
    assert message in error.message


def test_schemas_that_nothing_depends_on_may_say_anything():
    for fields in ({}, {"tool_choice": "none"}, {"tool_choice": NAMED}):
        tools = [TOOLS[0], *tool(properties={"a": {"not": {}}})]
        assert parse_chat(chat_body(tools=tools, **fields), SERVED)


def test_without_the_extra_only_what_needs_it_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    assert parse_chat(chat_body(tools=TOOLS), SERVED)
    for fields, param in (({"guided_regex": "a"}, "guided_regex"), ({"response_format": FORMAT}, "response_format"),
                          ({"tools": TOOLS, "tool_choice": "required"}, "tools")):
        error = refused(parse_chat, chat_body(**fields))
        assert (error.status, error.param, error.code) == (400, param, "extra_not_installed")
        assert "pip install 'llama-runtime[structured]'" in error.message


# ---- replies that a grammar makes ----------------------------------------------------------------------


def test_the_stream_of_a_call_that_a_grammar_makes_grows():
    call = parse_chat(chat_body(tools=TOOLS, tool_choice=NAMED, stream=True), SERVED)
    rendering = Rendering(call, SERVED, id=f"chat-{'0' * 32}")
    chunks, _ = answer(call, SERVED, {0: [*SERVED.tokenizer.encode(ADD), EOT]}, rendering)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    begin = {"index": 0, "id": f"call_{'0' * 32}_0_0", "type": "function", "function": {"name": "add", "arguments": ""}}
    assert deltas[:2] == [{"role": "assistant"}, {"tool_calls": [begin]}] and deltas[-1] == {"content": ""}
    pieces = [delta["tool_calls"][0]["function"]["arguments"] for delta in deltas[2:-1]]
    assert "".join(pieces) == '{"a": 1, "b": 2}' and len(pieces) > 8
    assert all(delta["tool_calls"][0] == {"index": 0, "function": {"arguments": piece}}
               for delta, piece in zip(deltas[2:-1], pieces))
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(("fields", "text", "ends", "arguments", "content", "reason"), [
    ({}, ADD, True, ['{"a": 1, "b": 2}'], None, "tool_calls"),
    ({}, ADD[:-6], False, ['{"a": 1, "b'], None, "length"),
    ({}, ADD[:12], False, [], ADD[:12], "length"),
    ({"stop": ["2"]}, ADD, True, ['{"a": 1, "b": '], None, "stop"),
    ({"tool_choice": "required"}, f"{ADD}; {NOW}", True, ['{"a": 1, "b": 2}', "{}"], None, "tool_calls"),
    ({"tool_choice": "required"}, f"{ADD}; {NOW[:-6]}", False, ['{"a": 1, "b": 2}'], f"; {NOW[:-6]}", "length"),
    ({"tool_choice": "auto", "parallel_tool_calls": False}, "Hi", True, [], "Hi", "stop"),
])  # fmt: skip
def test_what_ends_a_call_that_a_grammar_makes(fields, text, ends, arguments, content, reason):
    replies = []
    for stream in (True, False):
        call = parse_chat(chat_body(**{"tools": TOOLS, "tool_choice": NAMED, "stream": stream, **fields}), SERVED)
        rendering = Rendering(call, SERVED, id=f"chat-{'0' * 32}", created=7)
        chunks, _ = answer(call, SERVED, {0: [*SERVED.tokenizer.encode(text), *[EOT] * ends]}, rendering)
        replies.append(rendering.reply([*chunks, {**chunks[-1], "choices": [], "usage": {}}])["choices"])
    [choice] = replies[0]
    assert replies[0] == replies[1]
    found = [each["function"]["arguments"] for each in choice["message"]["tool_calls"]]
    assert (found, choice["message"]["content"], choice["finish_reason"]) == (arguments, content, reason)


def test_arguments_satisfy_the_schema_whatever_is_drawn(compiler):
    call = parse_chat(chat_body(tools=TOOLS, tool_choice="required"), SERVED)
    rng, num_calls = random.Random(2), 0
    for _ in range(20):
        ids = walk(compiler, SERVED.tokenizer, call.params.grammar, rng, most=300)
        chunks, _ = answer(call, SERVED, {0: ids}, rendering := Rendering(call, SERVED))
        [choice] = rendering.reply(chunks)["choices"]
        for each in choice["message"]["tool_calls"] if choice["finish_reason"] == "tool_calls" else ():
            schema = next(tool["function"] for tool in TOOLS if tool["function"]["name"] == each["function"]["name"])
            arguments = json.loads(each["function"]["arguments"])
            jsonschema.validate(arguments, schema.get("parameters", {"type": "object", "maxProperties": 0}))
            num_calls += 1
    assert num_calls > 10
