"""The published request and both published responses, byte for byte over a socket.

Free are only the id, the time and the token counts. Everything else is the specification's own text.
"""

import json
import re
import time

import pytest

from llama.text.tokenizer import Tokenizer
from tests.server import raw
from tests.server.clients import AUTHORIZED, CHAT, HELLO, KEY, NAME, PROJECT_CHAT, ROOT, Server

REQUEST = (b'{"temperature":0.5,"max_tokens":1024,"top_p":1,"frequency_penalty":0,"presence_penalty":1,'
           b'"stream":false,"model":"llama3_1_8b_instruct","messages":[{"role":"user","content":"Hello"}]}')
RESPONSE = (b'{"id":"chat-ID","object":"chat.completion","created":CREATED,"model":"llama3_1_8b_instruct",'
            b'"choices":[{"index":0,"message":{"role":"assistant",'
            b'"content":"Hello. How can I assist you today?","tool_calls":[]},'
            b'"logprobs":null,"finish_reason":"stop","stop_reason":null}],'
            b'"usage":{"prompt_tokens":COUNT,"total_tokens":COUNT,"completion_tokens":COUNT}}')
CHUNK = (b'data: {"id":"chat-ID","object":"chat.completion.chunk","created":CREATED,'
         b'"model":"llama3_1_8b_instruct","choices":[CHOICE]}\n\n')
ROLE = b'{"index":0,"delta":{"role":"assistant"},"logprobs":null,"finish_reason":null}'
TEXT = b'{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}'
LAST = b'{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":null}'
DONE = b"data: [DONE]\n\n"
ANSWER = "Hello. How can I assist you today?"

FREE = {b"ID": rb"([0-9a-f]{32})", b"CREATED": rb"([0-9]{10})", b"COUNT": rb"(0|[1-9][0-9]*)"}


def filled(published: bytes, received: bytes) -> list[bytes]:
    """What stands at the free places of a published text. Every other byte is as published."""
    pattern = re.sub(rb"ID|CREATED|COUNT", lambda place: FREE[place[0]], re.escape(published))
    match = re.fullmatch(pattern, received)
    assert match is not None, f"{received!r}\nis not\n{published!r}"
    return list(match.groups())


def chunk(choice: bytes) -> bytes:
    return CHUNK.replace(b"CHOICE", choice)


def text_chunk(text: str) -> bytes:
    return chunk(TEXT.replace(b'"Hello"', json.dumps(text).encode()))


def with_fields(**fields) -> bytes:
    """The published request with some of its fields changed, or with others besides."""
    return json.dumps(json.loads(REQUEST) | fields, separators=(",", ":")).encode()


STREAMED = REQUEST.replace(b'"stream":false', b'"stream":true')


# ---- the samples ----------------------------------------------------------------------------------------


def test_the_published_response(demo: Server):
    began = int(time.time())
    reply = demo.post(PROJECT_CHAT, REQUEST)
    assert (reply.status, reply.fields["content-type"]) == (200, "application/json")
    assert reply.is_whole and "transfer-encoding" not in reply.fields
    identity, created, *counts = filled(RESPONSE, reply.body)
    assert began <= int(created) <= time.time()
    assert reply.fields["x-request-id"] == f"chat-{identity.decode()}"
    prompt, total, completion = map(int, counts)
    assert prompt == demo.post("/tokenize", {"messages": HELLO}).json["count"]
    assert completion == len(pieces_of_the_answer()) + 1  # and the token that ends the turn
    assert total == prompt + completion


def test_the_published_stream(demo: Server):
    began = int(time.time())
    reply = demo.post(PROJECT_CHAT, STREAMED)
    assert (reply.status, reply.fields["content-type"]) == (200, "text/event-stream")
    assert reply.is_whole and reply.fields["transfer-encoding"] == "chunked"
    texts = b"".join(map(text_chunk, pieces_of_the_answer()))
    free = filled(chunk(ROLE) + texts + chunk(LAST) + DONE, reply.body)
    assert text_chunk("Hello") in texts  # the sample's second chunk stands there as published
    assert set(free[0::2]) == {free[0]} and set(free[1::2]) == {free[1]}  # one id and one time for all
    assert began <= int(free[1]) <= time.time()
    assert reply.fields["x-request-id"] == f"chat-{free[0].decode()}"


def pieces_of_the_answer() -> list[str]:
    tokenizer = Tokenizer.from_directory(ROOT / "llama" / "demo")
    pieces = [tokenizer.decode([token_id]) for token_id in tokenizer.encode(ANSWER, bos=False)]
    assert "".join(pieces) == ANSWER and len(pieces) > 3
    return pieces


def test_the_connection_can_go_on_after_either(demo: Server):
    with demo.open() as client:
        for body in (STREAMED, REQUEST) * 2:
            assert client.ask(raw.post(PROJECT_CHAT, body, AUTHORIZED)).is_whole


def test_it_is_the_same_over_the_plain_route(demo: Server):
    filled(RESPONSE, demo.post(CHAT, REQUEST).body)
    texts = b"".join(map(text_chunk, pieces_of_the_answer()))
    filled(chunk(ROLE) + texts + chunk(LAST) + DONE, demo.post(CHAT, STREAMED).body)


def test_the_last_chunk_has_the_last_text_where_the_length_ends_it(demo: Server):
    reply = demo.post(PROJECT_CHAT, STREAMED.replace(b"1024", b"2"))
    first, second, *_ = pieces_of_the_answer()
    last = LAST.replace(b'""', json.dumps(second).encode()).replace(b"stop", b"length", 1)
    filled(chunk(ROLE) + text_chunk(first) + chunk(last) + DONE, reply.body)
    whole = demo.post(PROJECT_CHAT, REQUEST.replace(b"1024", b"2"))
    expected = RESPONSE.replace(ANSWER.encode(), (first + second).encode())
    filled(expected.replace(b'"finish_reason":"stop"', b'"finish_reason":"length"'), whole.body)


def test_a_stop_string_is_the_stop_reason(demo: Server):
    whole = demo.post(PROJECT_CHAT, with_fields(stop=[" assist"]))
    expected = RESPONSE.replace(ANSWER.encode(), b"Hello. How can I")
    filled(expected.replace(b'"stop_reason":null', b'"stop_reason":" assist"'), whole.body)


def test_the_role_comes_once_for_each_choice(demo: Server):
    events = demo.post(PROJECT_CHAT, with_fields(stream=True, n=3)).events
    roles = [event for event in events if b'"role"' in event]
    assert roles == events[:3]
    for index, event in enumerate(roles):
        filled(chunk(ROLE.replace(b'"index":0', b'"index":%d' % index)), b"data: %s\n\n" % event)


def test_usage_in_a_stream_that_asks_for_it(demo: Server):
    reply = demo.post(PROJECT_CHAT, with_fields(stream=True, stream_options={"include_usage": True}))
    usage = chunk(b"").replace(b"}\n\n", b',"usage":{"prompt_tokens":COUNT,"total_tokens":COUNT,'
                               b'"completion_tokens":COUNT}}\n\n')
    chunks = [chunk(ROLE), *map(text_chunk, pieces_of_the_answer()), chunk(LAST)]
    chunks = [each.replace(b"}\n\n", b',"usage":null}\n\n') for each in chunks]
    filled(b"".join(chunks) + usage + DONE, reply.body)


# ---- the route ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [
    f"/project/p-7/genai/{NAME}{CHAT}?project_id=7&apikey=abc&location=north&active_iam=true",
    f"/project/p-7/genai/{NAME}{CHAT}/?project_id=7",
    f"//project/p-7//genai/{NAME}/{CHAT}?project_id=7",
    f"/project/p-07/genai/{NAME}{CHAT}?project_id=+7".replace("+", "%2B"),
])
def test_the_route_forgives(demo: Server, path: str):
    filled(RESPONSE, demo.post(path, REQUEST).body)


@pytest.mark.parametrize(("query", "words"), [
    ("", "project_id is required"), ("?project=7", "project_id is required"),
    ("?project_id=", "must be an integer"), ("?project_id=seven", "must be an integer"),
    ("?project_id=7.0", "must be an integer"), ("?project_id=7&project_id=7", "once"),
    ("?project_id=8", "project_id is 8, but the path has p-7"),
])
def test_the_route_asks_for_its_project(demo: Server, query: str, words: str):
    reply = demo.post(PROJECT_CHAT.partition("?")[0] + query, REQUEST)
    assert reply.status == 400
    assert words in reply.json["error"]["message"] and reply.json["error"]["param"] == "project_id"


def test_the_route_is_of_a_model_that_is_served(demo: Server):
    reply = demo.post(PROJECT_CHAT.replace(NAME, "another"), REQUEST)
    assert (reply.status, reply.code) == (404, "model_not_found")


def test_the_route_asks_for_the_key(demo: Server):
    for field in (f"{AUTHORIZED}x", "Authorization: Bearer", f"Authorization: {KEY}",
                  f"Authorization: Basic {KEY}", f"X-Api-Key: {KEY}"):
        reply = demo.post(PROJECT_CHAT, REQUEST, field)
        assert (reply.status, reply.code) == (401, "invalid_api_key")
