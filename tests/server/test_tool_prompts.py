"""Tools in prompts: the built-in ones, asked for by name; and calls that are sent back with their results."""

import pytest

from llama.text.chat import ChatTemplate
from server.protocol import parse_chat, tokenize
from tests.oracles import official_template
from tests.server.samples import chat_body, make_served
from tests.server.test_tool_replies import CALL, SERVED, call, calls_of, choice_of, tools
from tests.text.replies import TAG


@pytest.fixture(scope="module")
def official():
    """A small vocabulary with Llama 3.1's own template, whose control tokens are text in it."""
    return make_served(template=ChatTemplate(official_template()))


def named(*names: str) -> list[dict]:
    return [{"type": "function", "function": {"name": name}} for name in names]


def prompt(served, **fields) -> str:
    request = parse_chat(chat_body(**fields), served)
    assert tokenize(chat_body(**{name: fields[name] for name in fields if name in ("messages", "tools")}),
                    served)["tokens"] == list(request.prompts[0])
    return served.tokenizer.decode(request.prompts[0], skip_special_tokens=False)


def test_built_in_tools_are_asked_for_by_name_alone(official):
    text = prompt(official, tools=named("brave_search", "code_interpreter"))
    assert "Environment: ipython\nTools: brave_search\n\n" in text and "functions" not in text
    text = prompt(official, tools=[*named("wolfram_alpha"), *tools("f")])
    assert "Tools: wolfram_alpha\n\n" in text and '"name": "f"' in text
    assert '"name": "wolfram_alpha"' not in text
    text = prompt(official, tools=tools("brave_search"))
    assert "Tools:" not in text and '"name": "brave_search"' in text
    text = prompt(official, tools=named("f"))
    assert "Tools:" not in text and '"name": "f"' in text
    assert '"name": "brave_search"' in prompt(SERVED, tools=named("brave_search"))  # this template knows none


def test_built_in_tools_are_called(official):
    request = parse_chat(chat_body(tools=named("brave_search", "code_interpreter")), official)
    assert calls_of(choice_of(request, f'{TAG}brave_search.call(query="gold price")')) == [
        ("brave_search", '{"query": "gold price"}')]
    assert calls_of(choice_of(request, f"{TAG}print(1)")) == [("code_interpreter", '{"code": "print(1)"}')]
    assert calls_of(choice_of(request, "print(1)\n")) == []


def test_a_reply_with_calls_can_be_sent_back_with_their_results(official):
    """Where the template takes one call in a message, each stands in its own, followed by its own result."""
    message = choice_of(call(), f'{CALL};{CALL.replace("f", "g")}')["message"]
    results = [{"role": "tool", "tool_call_id": each["id"], "content": each["function"]["name"] + " says"}
               for each in reversed(message["tool_calls"])]
    messages = [{"role": "user", "content": "Go"}, message, *results]
    text = prompt(official, tools=tools("f", "g"), messages=messages)
    turns = text.split("<|start_header_id|>")[3:-1]
    assert [turn.split("<|end_header_id|>\n\n")[1].removesuffix("<|eot_id|>") for turn in turns] == [
        CALL, '"f says"', CALL.replace('"f"', '"g"'), '"g says"']
