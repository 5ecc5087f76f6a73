"""Tools in requests, what is refused of them; and the routes that turn text into ids and back."""

import hashlib
import json

import pytest

from llama.text.chat import ChatTemplate
from llama.text.tokenizer import Tokenizer
from server.protocol import detokenize, dumps, parse_chat, tokenize
from tests.oracles import meta_tokenizer_file, official_template
from tests.server.samples import BOS, CONTEXT, chat_body, make_served, refused

SERVED = make_served()
USER = {"role": "user", "content": "Hello"}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Add a & b",
                                           "parameters": {"type": "object", "properties": {}}}}]


# ---- tools ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official():
    """Llama 3.1's own tokenizer and template."""
    return make_served(tokenizer=Tokenizer.from_tiktoken_file(meta_tokenizer_file()),
                       template=ChatTemplate(official_template()))


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a":1,"b":2}'}}


@pytest.mark.parametrize(("fields", "digest", "num_tokens"), [
    ({"messages": [{"role": "user", "content": " Hi \n"}]}, "9ca3fce93e4de58b", 36),
    ({"messages": [{"role": "user", "content": "Add 1 and 2"}], "tools": TOOLS, "tool_choice": "auto"},
     "db3bcd3edc2b532d", 149),
    ({"messages": [{"role": "user", "content": "Add 1 and 2"},
                   {"role": "assistant", "content": None, "tool_calls": [CALL]},
                   {"role": "tool", "tool_call_id": "1", "content": "3"}], "tools": TOOLS},
     "5721be9221dc100d", 184),
])  # fmt: skip
def test_conversations_become_the_published_prompts(official, fields, digest, num_tokens):
    [prompt] = parse_chat(chat_body(**fields), official).prompts
    text = official.tokenizer.decode(prompt, skip_special_tokens=False)
    assert (hashlib.sha256(text.encode()).hexdigest()[:16], len(prompt)) == (digest, num_tokens)


def test_tools_are_in_the_prompt_unless_none_is_chosen():
    plain = parse_chat(chat_body(), SERVED).prompts
    assert parse_chat(chat_body(tools=TOOLS), SERVED).prompts != plain
    assert parse_chat(chat_body(tools=TOOLS, tool_choice="none"), SERVED).prompts == plain
    assert parse_chat(chat_body(tools=[], tool_choice="none"), SERVED).prompts == plain


@pytest.mark.parametrize(("fields", "param", "message"), [
    ({"tool_choice": "auto"}, "tool_choice", "tool_choice is only for requests with tools"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls",
     "parallel_tool_calls is only for requests with tools"),
    ({"echo": True}, "echo",
     "echo needs continue_final_message: in a chat it repeats the message that is continued"),
])  # fmt: skip
def test_what_is_not_done_is_refused_not_ignored(fields, param, message):
    error = refused(parse_chat, chat_body(**fields))
    assert (error.status, error.param, error.message) == (400, param, message)


# ---- /tokenize and /detokenize -------------------------------------------------------------------------


def test_tokenize_and_back():
    reply = tokenize(json.dumps({"prompt": "Hello 🦙"}).encode(), SERVED)
    assert reply == {"count": 1 + len(reply["tokens"][1:]), "max_model_len": CONTEXT,
                     "tokens": [BOS, *SERVED.tokenizer.encode("Hello 🦙")]}
    reply_without = tokenize(b'{"prompt":"ab","add_special_tokens":false}', SERVED)
    assert reply_without["tokens"] == SERVED.tokenizer.encode("ab")
    assert tokenize(chat_body(), SERVED)["tokens"] == list(parse_chat(chat_body(), SERVED).prompts[0])
    body = chat_body(tools=TOOLS, add_generation_prompt=False)
    assert tokenize(body, SERVED)["tokens"] == list(parse_chat(body, SERVED).prompts[0])
    assert detokenize(dumps({"tokens": reply["tokens"]}), SERVED) == {"prompt": "<|begin_of_text|>Hello 🦙"}
    assert detokenize(b'{"tokens":[]}', SERVED) == {"prompt": ""}


@pytest.mark.parametrize(("read", "body", "param"), [
    (tokenize, {}, "prompt"), (tokenize, {"prompt": "x", "messages": [USER]}, "prompt"),
    (tokenize, {"prompt": "x", "tools": TOOLS}, "tools"), (tokenize, {"prompt": 1}, "prompt"),
    (tokenize, {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
    (tokenize, {"prompt": "x", "continue_final_message": True}, "continue_final_message"),
    (tokenize, {"messages": [USER], "add_special_tokens": True}, "add_special_tokens"),
    (tokenize, {"messages": [{"role": "user"}]}, "messages[0].content"),
    (tokenize, {"prompt": "x", "y": 1}, "y"),
    (detokenize, {}, "tokens"), (detokenize, {"tokens": [264]}, "tokens[0]"),
    (detokenize, {"tokens": [True]}, "tokens[0]"),
    (detokenize, {"tokens": [[1]]}, "tokens[0]"), (detokenize, {"tokens": "x"}, "tokens"),
    (detokenize, {"tokens": [1] * (2**20 + 1)}, "tokens"),
])  # fmt: skip
def test_malformed_requests_for_tokens_are_refused(read, body, param):
    error = refused(read, json.dumps(body).encode())
    assert (error.status, error.param) == (400, param)
