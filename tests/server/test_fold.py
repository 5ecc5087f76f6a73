"""The reply is the fold of the chunks: for generated answers of every kind, also as others read them."""

import json
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion as OpenAICompletion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from server.protocol import Rendering, dumps, parse_chat, parse_completion
from server.replies import CHAT_CHUNK, CHAT_COMPLETION, COMPLETION, COMPLETION_CHUNK
from tests.server.samples import EOT, VOCAB, answer, chat_body, completion_body, make_served

SERVED = make_served()


def ids(text: str) -> list[int]:
    return SERVED.tokenizer.encode(text)


# Bytes of UTF-8 in and out of order, merged tokens, control tokens, the letters of stop strings.
_IDS = st.one_of(st.sampled_from([*ids("ab"), *ids("abab"), *ids("ba"), *ids("a"), *ids("b"), *ids("🦙é"), 2]),
                 st.integers(0, VOCAB - 1))
_STOPS = st.lists(st.sampled_from(["ab", "aba", "bb", "a🦙", "🦙", "\ufffd"]), max_size=3)


@st.composite
def _cases(draw):
    chat = draw(st.booleans())
    fields = {"n": draw(st.integers(1, 3)), "stop": draw(_STOPS), "ignore_eos": draw(st.booleans()),
              "include_stop_str_in_output": draw(st.booleans()), "skip_special_tokens": draw(st.booleans()),
              "prompt_logprobs": draw(st.none() | st.integers(0, 2)), "stream": draw(st.booleans())}
    if fields["stream"] and draw(st.booleans()):
        fields["stream_options"] = {"include_usage": True, "continuous_usage_stats": draw(st.booleans())}
    num_top = draw(st.none() | st.integers(0, 3))
    prompts = ["x"]
    if chat:
        fields |= {"logprobs": num_top is not None, "top_logprobs": num_top}
        if draw(st.booleans()):
            messages = [{"role": "assistant", "content": "a "}]
            fields |= {"messages": messages, "continue_final_message": True, "echo": True}
    else:
        prompts = draw(st.lists(st.text("ab🦙", max_size=3), min_size=1, max_size=3))
        fields |= {"logprobs": num_top, "echo": draw(st.booleans()), "prompt": prompts}
    parse, body = (parse_chat, chat_body) if chat else (parse_completion, completion_body)
    call = parse(body(**fields), SERVED)
    drawn = draw(st.lists(st.lists(_IDS, min_size=1, max_size=12), min_size=call.num_choices,
                          max_size=call.num_choices))
    for sample in drawn:
        if EOT in sample and not fields["ignore_eos"]:
            del sample[sample.index(EOT) + 1:]
    return call, dict(enumerate(drawn))


@settings(max_examples=300)
@given(_cases())
def test_the_reply_is_the_fold_of_the_chunks_and_says_what_was_generated(case):
    call, drawn = case
    rendering = Rendering(call, SERVED)
    chunks, readers = answer(call, SERVED, drawn, rendering)
    wire = [json.loads(dumps(chunk)) for chunk in chunks]
    if call.stream and not call.include_usage:
        assert all("usage" not in chunk for chunk in wire)
        wire.append(wire[-1] | {"choices": [], "usage": rendering.usage()})
    reply = rendering.reply(wire)
    num_generated = sum(len(one.ids) for each in readers for one in each.completions())
    assert reply["usage"]["completion_tokens"] == num_generated
    assert [choice["index"] for choice in reply["choices"]] == list(drawn)
    for choice in reply["choices"]:
        prompt, sample = divmod(choice["index"], call.params.n)
        expected = readers[prompt].completions()[sample]
        text = choice["message"]["content"] if call.kind == "chat" else choice["text"]
        assert text == (call.echo_texts[prompt] if call.echo_texts else "") + expected.text
        assert choice["finish_reason"] == expected.finish_reason
        assert choice["stop_reason"] == expected.stop_reason
        _check_logprobs(call, choice, expected)
        _check_parts(call, choice["index"], text, wire)
    assert ("prompt_logprobs" in (reply if call.kind == "chat" else reply["choices"][0])) \
        == (call.prompt_logprobs is not None)


def _check_logprobs(call, choice, expected):
    """An entry for every token, generated or echoed, held back or cut."""
    if call.params.logprobs is None:
        assert choice["logprobs"] is None
        return
    scores = list(expected.logprobs)
    if call.kind == "chat":
        entries = choice["logprobs"]["content"]
        values = [entry["logprob"] for entry in entries]
        raw = b"".join(bytes(entry["bytes"]) for entry in entries)
        assert raw == b"".join(map(SERVED.tokenizer.token_bytes, expected.ids))
        assert all(len(entry["top_logprobs"]) == call.params.logprobs for entry in entries)
    else:
        if call.echo_texts:
            scores = [*expected.prompt_logprobs, *scores]
        values = choice["logprobs"]["token_logprobs"]
        assert {len(values) for values in choice["logprobs"].values()} == {len(scores)}
        _check_offsets(call, choice, scores, expected)
    assert values == [each.logprob for each in scores]


def _check_offsets(call, choice, scores, expected):
    """Offsets rise; where a token is whole characters that are in the text, the text has it there."""
    offsets = choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0
    if expected.stop_reason is not None or not call.params.skip_special_tokens:
        return
    for offset, token, each in zip(offsets, choice["logprobs"]["tokens"], scores):
        if not token.startswith("bytes:") and not SERVED.tokenizer.is_special(each.token_id):
            assert choice["text"].startswith(token, offset)


def _check_parts(call, index, text, wire):
    """What each chunk of a stream may say, and that the texts add up without the rest of the fold."""
    parts = [choice for chunk in wire for choice in chunk["choices"] if choice["index"] == index]
    if call.kind == "chat":
        assert parts[0]["delta"] == {"role": "assistant"}
        assert all(set(part["delta"]) == {"content"} for part in parts[1:])
        assert "".join(part["delta"].get("content", "") for part in parts) == text
    else:
        assert "".join(part["text"] for part in parts) == text
    assert [("stop_reason" in part, part["finish_reason"] is not None) for part in parts] == \
        [(False, False)] * (len(parts) - 1) + [(True, True)]


# ---- independent readers -------------------------------------------------------------------------------


@settings(max_examples=60)
@given(_cases())
def test_answers_are_read_by_the_openai_package_and_fit_their_schemas(case):
    call, drawn = case
    rendering = Rendering(call, SERVED)
    chunks, _ = answer(call, SERVED, drawn, rendering)
    is_chat = call.kind == "chat"
    for chunk in chunks:
        (CHAT_CHUNK if is_chat else COMPLETION_CHUNK).check(chunk, ())
        if is_chat:
            ChatCompletionChunk.model_validate(chunk)
    whole = replace(call, stream=False, include_usage=False, continuous_usage=False)
    rendering = Rendering(whole, SERVED)
    reply = rendering.reply(answer(whole, SERVED, drawn, rendering)[0])
    if is_chat:
        CHAT_COMPLETION.check(reply, ())
        assert ChatCompletion.model_validate(reply).choices[0].message.content is not None
    else:
        COMPLETION.check(reply, ())
        if not call.echoes_logprobs:  # its types know no null for the first token; its client does not mind
            OpenAICompletion.model_validate(reply)
        parsed = OpenAICompletion.construct(**reply)
        assert parsed.choices[0].text == reply["choices"][0]["text"]
