"""Calls of tools in answers: OpenAI's deltas, byte for byte, and the reply that they add up to."""

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from llama.completion import Delta
from server.call import Call
from server.protocol import Rendering, dumps, parse_chat
from server.rendering import fold
from server.replies import CHAT_CHUNK, CHAT_COMPLETION
from tests.server.samples import EOT, answer, chat_body, make_served
from tests.text.replies import TAG, as_bytes, random_call

SERVED = make_served()
HEX = "a8fa533f74b346688f780c3b2e14638f"
HEAD = (f'{{"id":"chat-{HEX}","object":"chat.completion.chunk","created":7,"model":"llama3_1_8b_instruct",'
        '"choices":[')
END = ',"logprobs":null,"finish_reason":null}]}'
CALL = '{"name": "f", "parameters": {"a": 1}}'


def tools(*names: str) -> list[dict]:
    return [{"type": "function", "function": {"name": name, "description": "Do it", "parameters": {}}}
            for name in names]


def call(**fields) -> Call:
    return parse_chat(chat_body(**{"tools": tools("f", "g")} | fields), SERVED)


def ids(text: str) -> list[int]:
    return as_bytes(SERVED.tokenizer, text)


def answered(call: Call, *replies: str, ends: bool = True) -> tuple[list[dict], dict]:
    """All chunks of an answer whose choices draw these texts, and the reply folded from them."""
    rendering = Rendering(call, SERVED, id=f"chat-{HEX}", created=7)
    drawn = {choice: ids(text) + [EOT] * ends for choice, text in enumerate(replies)}
    chunks, _ = answer(call, SERVED, drawn, rendering)
    return chunks, rendering.reply(chunks)


def choice_of(call: Call, reply: str, **options) -> dict:
    """The one choice of the folded reply."""
    [choice] = answered(call, reply, **options)[1]["choices"]
    return choice


def calls_of(choice: dict) -> list[tuple[str, str]]:
    functions = [each["function"] for each in choice["message"]["tool_calls"]]
    return [(function["name"], function["arguments"]) for function in functions]


# ---- byte for byte ------------------------------------------------------------------------------------


def test_the_stream_of_a_call():
    chunks, _ = answered(call(stream=True), f"{TAG}{CALL}")
    assert [dumps(chunk).decode() for chunk in chunks] == [
        HEAD + '{"index":0,"delta":{"role":"assistant"}' + END,
        HEAD + f'{{"index":0,"delta":{{"tool_calls":[{{"index":0,"id":"call_{HEX}_0_0","type":"function",'
        '"function":{"name":"f","arguments":""}}]}' + END,
        HEAD + '{"index":0,"delta":{"tool_calls":[{"index":0,'
        '"function":{"arguments":"{\\"a\\": 1}"}}]}' + END,
        HEAD + '{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"tool_calls",'
        '"stop_reason":null}]}',
    ]


def test_the_reply_of_a_call():
    request = call()
    _, reply = answered(request, CALL)
    prompt, generated = len(request.prompts[0]), len(CALL) + 1
    assert dumps(reply).decode() == (
        f'{{"id":"chat-{HEX}","object":"chat.completion","created":7,"model":"llama3_1_8b_instruct",'
        '"choices":[{"index":0,"message":{"role":"assistant","content":null,"tool_calls":['
        f'{{"id":"call_{HEX}_0_0",'
        '"type":"function","function":{"name":"f","arguments":"{\\"a\\": 1}"}}]},"logprobs":null,'
        '"finish_reason":"tool_calls","stop_reason":null}],"usage":{'
        f'"prompt_tokens":{prompt},"total_tokens":{prompt + generated},"completion_tokens":{generated}}}}}')


def test_an_answer_without_a_call_is_as_without_tools():
    for text in ("Hello 🦙", '{"answer": 1}', "", "[1]\n{}"):
        plain, with_tools = (answered(parse_chat(chat_body(**fields), SERVED), text)
                             for fields in ({}, {"tools": tools("f")}))
        without_usage = [{key: value for key, value in reply.items() if key != "usage"}
                         for _, reply in (plain, with_tools)]
        assert dumps(without_usage[0]) == dumps(without_usage[1])
    [*_, last] = answered(call(stream=True), "Hello")[0]
    assert last["choices"][0] == {"index": 0, "delta": {"content": ""}, "logprobs": None,
                                  "finish_reason": "stop", "stop_reason": None}


def test_tools_that_are_not_to_be_used_make_no_calls():
    assert choice_of(call(tool_choice="none"), CALL)["message"] == {"role": "assistant", "content": CALL,
                                                                   "tool_calls": []}
    assert call(tool_choice="none").tool_names == call(tools=[]).tool_names == ()
    assert call().tool_names == call(tool_choice="auto").tool_names == ("f", "g")
    assert choice_of(call(), CALL.replace('"f"', '"h"'))["message"]["tool_calls"] == []


def test_every_choice_has_its_own_calls():
    choices = answered(call(n=2), CALL, f"{CALL};{CALL}")[1]["choices"]
    made = [[each["id"] for each in choice["message"]["tool_calls"]] for choice in choices]
    assert made == [[f"call_{HEX}_0_0"], [f"call_{HEX}_1_0", f"call_{HEX}_1_1"]]


def test_arguments_may_come_in_pieces():
    chunks, reply = answered(call(), CALL)
    [place] = [place for place, chunk in enumerate(chunks) if "1}" in dumps(chunk).decode()]
    pieces = [json.loads(dumps(chunks[place])) for _ in range(2)]
    for piece, arguments in zip(pieces, ('{"a"', ": 1}")):
        piece["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"] = arguments
    assert fold([*chunks[:place], *pieces, *chunks[place + 1:]]) == reply


# ---- text and calls -----------------------------------------------------------------------------------


def test_text_stands_beside_calls():
    request = call(stream=True)
    chunks, reply = answered(request, f'I look.\n{CALL}; {CALL.replace("f", "g")}\nDone')
    assert reply["choices"][0]["message"]["content"] == "I look.\n\nDone"
    assert calls_of(reply["choices"][0]) == [("f", '{"a": 1}'), ("g", '{"a": 1}')]
    assert [each["id"] for each in reply["choices"][0]["message"]["tool_calls"]] == \
        [f"call_{HEX}_0_0", f"call_{HEX}_0_1"]
    kinds = [next(iter(chunk["choices"][0]["delta"])) for chunk in chunks]
    assert [kind for kind, _ in itertools.groupby(kinds)] == ["role", "content", "tool_calls", "content"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert [each["index"] for delta in deltas for each in delta.get("tool_calls", ())] == [0, 0, 1, 1]


def test_text_comes_as_soon_as_it_is_none_of_a_call():
    request = call(stream=True)
    rendering = Rendering(request, SERVED)
    chunks, _ = answer(request, SERVED, {0: [*ids('{"x":'), EOT]}, rendering)
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:]] == [
        {"content": '{"x'}, {"content": '"'}, {"content": ":"}, {"content": ""}]


@pytest.mark.parametrize(("fields", "reply", "ends", "content", "num_calls", "reason", "stop_reason"), [
    ({}, CALL[:-1], False, CALL[:-1], 0, "length", None),
    ({}, CALL[:-1], True, CALL[:-1], 0, "stop", None),
    ({}, CALL, False, None, 1, "length", None),
    ({}, f"Hi\n{CALL};{CALL[:-3]}", False, f"Hi\n;{CALL[:-3]}", 1, "length", None),
    ({"stop": ["}}"]}, CALL, True, CALL[:-2], 0, "stop", "}}"),
    ({"stop": ["}}"], "include_stop_str_in_output": True}, CALL, True, None, 1, "tool_calls", "}}"),
    ({"stop": ["\n"]}, f"{CALL}\nx", True, None, 1, "tool_calls", "\n"),
])  # fmt: skip
def test_what_ends_a_reply_with_tools(fields, reply, ends, content, num_calls, reason, stop_reason):
    choice = choice_of(call(**fields), reply, ends=ends)
    assert choice["message"]["content"] == content
    assert len(choice["message"]["tool_calls"]) == num_calls
    assert (choice["finish_reason"], choice["stop_reason"]) == (reason, stop_reason)


@pytest.mark.parametrize(("ending", "is_cut"), [
    ({"finish_reason": "stop"}, False), ({"finish_reason": "stop", "stop_reason": 7}, False),
    ({"finish_reason": "stop", "stop_reason": "x"}, True), ({"finish_reason": "length"}, True),
])  # fmt: skip
def test_a_call_may_be_open_where_the_model_ends_it(ending, is_cut):
    """By the end of its turn, or a token that was to be the end; not by a limit, or a stop string."""
    text = '<function=f>{"a": 1}'
    rendering = Rendering(call(), SERVED)
    chunks = [*rendering.opening(), *rendering.delta(0, Delta(0, text, tuple(ids(text)), **ending)),
              *rendering.closing()]
    [choice] = rendering.reply(chunks)["choices"]
    assert calls_of(choice) == ([] if is_cut else [("f", '{"a": 1}')])
    assert choice["message"]["content"] == (text if is_cut else None)


def test_a_reply_may_go_on_from_the_text_before():
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "I add."}]
    choice = choice_of(call(messages=messages, continue_final_message=True, echo=True), f"\n{CALL}")
    assert choice["message"]["content"] == "I add." and calls_of(choice) == [("f", '{"a": 1}')]


def test_control_tokens_that_are_shown_are_text():
    choice = choice_of(call(skip_special_tokens=False), f"{TAG}{CALL}")
    assert choice["message"]["content"] == "<|python_tag|>" and calls_of(choice) == [("f", '{"a": 1}')]


# ---- of every kind, as others read them ---------------------------------------------------------------


@st.composite
def _answers(draw):
    def reply() -> str:
        parts = st.sampled_from(["Hi.", "\n", CALL, ";", TAG, '{"name": "f"', "🦙", "[f(a='x'), g()]", "{",
                                 "}", '<function=g>{"b": []}</function>', "print(1)"])
        return "".join(draw(st.lists(parts, min_size=1, max_size=5))) or "x"

    fields = {"n": draw(st.integers(1, 3)), "stream": draw(st.booleans()), "logprobs": draw(st.booleans()),
              "stop": draw(st.lists(st.sampled_from([";", "Hi", "\n", '"a"', "🦙"]), max_size=2)),
              "skip_special_tokens": draw(st.booleans()), "tools": tools("f", "g", "code_interpreter")}
    if fields["stream"]:
        fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": draw(st.booleans())}
    return call(**fields), [reply() for _ in range(fields["n"])], draw(st.booleans())


@settings(max_examples=200, deadline=None)
@given(_answers())
def test_the_reply_is_the_fold_of_the_stream_also_as_the_openai_package_folds_it(case):
    request, replies, ends = case
    chunks, reply = answered(request, *replies, ends=ends)
    state = ChatCompletionStreamState()
    for chunk in chunks:
        CHAT_CHUNK.check(chunk, ())
        state.handle_chunk(ChatCompletionChunk.model_validate(chunk))
    CHAT_COMPLETION.check(reply, ())
    folded = state.current_completion_snapshot
    for ours, theirs in zip(ChatCompletion.model_validate(reply).choices, folded.choices, strict=True):
        assert (ours.message.content or "") == (theirs.message.content or "")
        assert [told(each) for each in ours.message.tool_calls] == [
            told(each) for each in theirs.message.tool_calls or ()]
        assert ours.finish_reason == theirs.finish_reason
    for choice in reply["choices"]:
        check_parts(request, choice, [each for chunk in chunks for each in chunk["choices"]
                                      if each["index"] == choice["index"]])
        is_cut = choice["finish_reason"] == "length" or isinstance(choice["stop_reason"], str)
        num_calls = len(choice["message"]["tool_calls"])
        has_called = num_calls > 0 and choice["finish_reason"] != "length"
        assert (choice["finish_reason"] == "tool_calls") == has_called
        assert is_cut or choice["message"]["content"] is not None or num_calls


def told(call: Any) -> tuple[str, str, str, str]:
    return call.id, call.type, call.function.name, call.function.arguments


def check_parts(request: Call, choice: dict, parts: list[dict]) -> None:
    """A role, then one thing in each chunk, and in the last the end; all log probabilities, each once."""
    assert [list(part["delta"]) for part in (parts[0], parts[-1])] == [["role"], ["content"]]
    assert all(len(part["delta"]) == 1 for part in parts)
    assert [("stop_reason" in part, part["finish_reason"] is not None) for part in parts] == \
        [(False, False)] * (len(parts) - 1) + [(True, True)]
    entries = [entry for part in parts for entry in (part["logprobs"] or {}).get("content", ())]
    assert entries == ((choice["logprobs"] or {}).get("content") or [])
    assert (choice["logprobs"] is not None) == (request.params.logprobs is not None)


@pytest.mark.parametrize("form", ["json", "function", "list", "dotted"])
def test_a_stream_and_a_reply_say_the_same_of_every_form(form):
    for seed in range(20):
        written = random_call(random.Random(f"{form} {seed}"), form)
        names = sorted({name for name, _ in written.calls})
        as_stream = {"stream": True, "stream_options": {"include_usage": True}}
        replies = [answered(call(tools=tools(*names), logprobs=True, **fields), written.text)[1]
                   for fields in ({}, as_stream)]
        assert dumps(replies[0]) == dumps(replies[1])
        [choice] = replies[0]["choices"]
        assert [(name, json.loads(arguments)) for name, arguments in calls_of(choice)] == list(written.calls)
        assert b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]) == \
            b"".join(map(SERVED.tokenizer.token_bytes, [*ids(written.text), EOT]))
