"""Deltas to JSON: the published answers byte for byte, usage, echo, scoring."""

from dataclasses import replace

import pytest

from llama.completion import Delta
from server.protocol import Rendering, dumps, parse_chat, parse_completion
from tests.server.samples import EOT, answer, chat_body, completion_body, make_served, prompt_scores

SERVED = make_served()
ID, CREATED = "chat-a8fa533f74b346688f780c3b2e14638f", 1738753122
HEAD = (f'{{"id":"{ID}","object":"chat.completion.chunk","created":{CREATED},"model":"llama3_1_8b_instruct",'
        '"choices":[')


def ids(text: str) -> list[int]:
    return SERVED.tokenizer.encode(text)


def published(call) -> Rendering:
    return Rendering(call, SERVED, id=ID, created=CREATED)


def lines(chunks) -> list[str]:
    return [dumps(chunk).decode() for chunk in chunks]


# ---- the published answers -----------------------------------------------------------------------------


def test_the_published_stream():
    rendering = published(parse_chat(chat_body(stream=True), SERVED))
    chunks = [*rendering.opening(), *rendering.delta(0, Delta(0, "Hello", (5,))),
              *rendering.delta(0, Delta(0, "", (EOT,), finish_reason="stop")), *rendering.closing()]
    assert lines(chunks) == [
        HEAD + '{"index":0,"delta":{"role":"assistant"},"logprobs":null,"finish_reason":null}]}',
        HEAD + '{"index":0,"delta":{"content":"Hello"},"logprobs":null,"finish_reason":null}]}',
        HEAD + '{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop","stop_reason":null}'
        "]}",
    ]


def test_the_published_reply():
    call = parse_chat(chat_body(), SERVED)
    rendering = published(call)
    chunks, _ = answer(call, SERVED, {0: [*ids("…"), EOT]}, rendering)
    assert dumps(rendering.reply(chunks)).decode() == (
        f'{{"id":"{ID}","object":"chat.completion","created":{CREATED},"model":"llama3_1_8b_instruct",'
        '"choices":[{"index":0,"message":{"role":"assistant","content":"…","tool_calls":[]},"logprobs":null,'
        f'"finish_reason":"stop","stop_reason":null}}],"usage":{{"prompt_tokens":{len(call.prompts[0])},'
        f'"total_tokens":{len(call.prompts[0]) + 4},"completion_tokens":4}}}}')


def test_ids_and_times_are_made_once_for_an_answer():
    one, other = (Rendering(parse_chat(chat_body(n=2), SERVED), SERVED) for _ in range(2))
    assert len({(chunk["id"], chunk["created"]) for chunk in [*one.opening(), *one.closing()]}) == 1
    assert one.id.startswith("chat-") and len(one.id) == 37 and one.id != other.id
    assert Rendering(parse_completion(completion_body(), SERVED), SERVED).id.startswith("cmpl-")


def test_the_last_text_comes_with_the_length():
    call = parse_chat(chat_body(stream=True), SERVED)
    chunks, _ = answer(call, SERVED, {0: ids("ab") + ids("c")}, published(call))
    assert lines(chunks)[2:] == [
        HEAD + '{"index":0,"delta":{"content":"c"},"logprobs":null,"finish_reason":"length",'
        '"stop_reason":null}]}']


def test_what_stopped_is_named_and_cut():
    call = parse_chat(chat_body(stream=True, stop=["STOP"]), SERVED)
    chunks, _ = answer(call, SERVED, {0: ids("xSTOPy")}, published(call))
    [*_, last] = chunks
    assert last["choices"][0] == {"index": 0, "delta": {"content": ""}, "logprobs": None,
                                  "finish_reason": "stop", "stop_reason": "STOP"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks[1:-1]] == [{"content": "x"}]


def test_nothing_is_said_while_nothing_is_certain():
    call = parse_chat(chat_body(stream=True), SERVED)
    chunks, _ = answer(call, SERVED, {0: [*ids("🦙é"), EOT]}, published(call))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant"}, {"content": "🦙"}, {"content": "é"}, {"content": ""}]


def test_completions_have_their_own_shape():
    call = parse_completion(completion_body(stream=True, prompt="a", echo=True), SERVED)
    chunks, _ = answer(call, SERVED, {0: [*ids("b"), EOT]}, Rendering(call, SERVED, id="cmpl-0", created=7))
    head = '{"id":"cmpl-0","object":"text_completion","created":7,"model":"llama3_1_8b_instruct","choices":['
    assert lines(chunks) == [
        head + '{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}',
        head + '{"index":0,"text":"b","logprobs":null,"finish_reason":null}]}',
        head + '{"index":0,"text":"","logprobs":null,"finish_reason":"stop","stop_reason":null}]}']
    call = replace(call, stream=False)
    rendering = Rendering(call, SERVED, id="cmpl-0", created=7)
    chunks, _ = answer(call, SERVED, {0: [*ids("b"), EOT]}, rendering)
    assert dumps(rendering.reply(chunks)).decode() == (
        head + '{"index":0,"text":"ab","logprobs":null,"finish_reason":"stop","stop_reason":null}],'
        '"usage":{"prompt_tokens":2,"total_tokens":4,"completion_tokens":2}}')


# ---- usage ---------------------------------------------------------------------------------------------


def usages(**options) -> list:
    call = parse_completion(completion_body(prompt=["a", "b"], n=2, stream=True, **options), SERVED)
    drawn = {0: [5, EOT], 1: [5, 6, EOT], 2: [EOT], 3: [7, EOT]}
    chunks, _ = answer(call, SERVED, drawn, Rendering(call, SERVED))
    return [(len(chunk["choices"]), chunk.get("usage", "absent")) for chunk in chunks]


def test_usage_is_a_chunk_of_its_own_where_it_is_asked_for():
    assert {usage for _, usage in usages()} == {"absent"}
    *before, last = usages(stream_options={"include_usage": True})
    assert {usage for _, usage in before} == {None}
    # a prompt counts once
    assert last == (0, {"prompt_tokens": 4, "total_tokens": 12, "completion_tokens": 8})


def test_usage_may_come_with_each_chunk():
    *before, last = usages(stream_options={"include_usage": True, "continuous_usage_stats": True})
    counts = [usage["completion_tokens"] for _, usage in before]
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == 8 == last[1]["completion_tokens"]
    assert all(usage["total_tokens"] == 4 + usage["completion_tokens"] for _, usage in before)


# ---- echo, scoring and the prompt's log probabilities --------------------------------------------------


def test_scoring_as_evaluation_harnesses_do_it():
    """They ask for one token, and read the log probabilities from the end of the context to that token."""
    served, context, continuation = SERVED, ids("The sky is"), ids(" blue")
    call = parse_completion(completion_body(prompt=[context + continuation] * 2, max_tokens=1, temperature=0,
                                            logprobs=1, echo=True, seed=1234), served)
    rendering = Rendering(call, served)
    chunks, _ = answer(call, served, {0: [EOT], 1: [9]}, rendering)
    expected = [each.logprob for each in prompt_scores(context + continuation, 1)]
    for choice in rendering.reply(chunks)["choices"]:
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(context + continuation) + 1}
        assert logprobs["token_logprobs"][len(context):-1] == expected[len(context):]
        assert all(max(top.values()) == -0.25 for top in logprobs["top_logprobs"][len(context):-1])
        assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None


def test_max_tokens_0_returns_the_prompt_alone():
    for stream in (False, True):
        options = {"include_usage": True} if stream else None
        call = parse_completion(completion_body(prompt=["ab", "c"], echo=True, max_tokens=0, logprobs=0, n=2,
                                                stream=stream, stream_options=options), SERVED)
        rendering = Rendering(call, SERVED)
        chunks, _ = answer(call, SERVED, {0: [9], 1: [EOT], 2: [9], 3: [9]}, rendering)
        reply = rendering.reply(chunks)
        assert [choice["text"] for choice in reply["choices"]] == ["ab", "ab", "c", "c"]
        assert {choice["finish_reason"] for choice in reply["choices"]} == {"length"}
        assert reply["choices"][0]["logprobs"]["tokens"] == ["<|begin_of_text|>", "ab"]
        assert reply["usage"] == {"prompt_tokens": 4, "total_tokens": 4, "completion_tokens": 0}


def test_a_reply_does_not_complete_a_character_of_the_prompt():
    *begun, last = ids("🦙")
    call = parse_completion(completion_body(prompt=begun, echo=True, logprobs=0), SERVED)
    rendering = Rendering(call, SERVED)
    chunks, _ = answer(call, SERVED, {0: [last, *ids("a")]}, rendering)
    [choice] = rendering.reply(chunks)["choices"]
    assert (choice["text"], choice["logprobs"]["text_offset"]) == ("\ufffd\ufffda", [0, 1, 2])


def test_prompt_log_probabilities():
    body = completion_body(prompt=["ab"], prompt_logprobs=1, logprobs=3, echo=True, n=2)
    call = parse_completion(body, SERVED)
    rendering = Rendering(call, SERVED)
    chunks, _ = answer(call, SERVED, {0: [EOT], 1: [EOT]}, rendering)
    [ab] = ids("ab")
    scores = [None, {str(ab): {"logprob": -20 - ab / 8, "rank": None, "decoded_token": "ab"},
                     "0": {"logprob": -0.25, "rank": 1, "decoded_token": "<|begin_of_text|>"}}]
    reply = rendering.reply(chunks)
    assert [choice["prompt_logprobs"] for choice in reply["choices"]] == [scores, scores]
    assert list(reply["choices"][0])[-3:] == ["finish_reason", "stop_reason", "prompt_logprobs"]
    call = parse_chat(chat_body(prompt_logprobs=0, n=2), SERVED)
    rendering = Rendering(call, SERVED)
    chunks, _ = answer(call, SERVED, {0: [EOT], 1: [EOT]}, rendering)
    reply = rendering.reply(chunks)
    assert len(reply["prompt_logprobs"]) == len(call.prompts[0]) and reply["prompt_logprobs"][0] is None
    assert list(reply)[-2:] == ["usage", "prompt_logprobs"]
    assert sum("prompt_logprobs" in chunk for chunk in chunks) == 1


def test_a_chat_repeats_what_it_continues():
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "It is "}]
    call = parse_chat(chat_body(messages=messages, continue_final_message=True, echo=True, n=2), SERVED)
    rendering = Rendering(call, SERVED)
    chunks, _ = answer(call, SERVED, {0: [*ids(" 4"), EOT], 1: [*ids(" four"), EOT]}, rendering)
    texts = [choice["message"]["content"] for choice in rendering.reply(chunks)["choices"]]
    assert texts == ["It is 4", "It is four"]


@pytest.mark.parametrize("parse", [parse_chat, parse_completion])
def test_a_stream_and_a_reply_say_the_same(parse):
    body = chat_body if parse is parse_chat else completion_body
    drawn = {0: [*ids("abab🦙"), EOT], 1: ids("x")}
    replies = []
    for fields in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
        call = parse(body(n=2, logprobs=1, **fields) if parse is parse_completion
                     else body(n=2, logprobs=True, top_logprobs=1, **fields), SERVED)
        rendering = Rendering(call, SERVED, id=ID, created=CREATED)
        replies.append(rendering.reply(answer(call, SERVED, drawn, rendering)[0]))
    assert dumps(replies[0]) == dumps(replies[1])
