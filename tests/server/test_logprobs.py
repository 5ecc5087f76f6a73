"""Log probabilities in the forms that clients know."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.engine.request import TokenLogprob
from llama.text.tokenizer import Tokenizer
from server.logprobs import TextOffsets, chat_logprobs, completion_logprobs, prompt_logprobs, token_text
from tests.text.samples import small_tokenizer

TOKENIZER = Tokenizer(small_tokenizer())
BOS, EOT = 0, 1
[AB], [A] = TOKENIZER.encode("ab"), TOKENIZER.encode("a")
*LLAMA, TAIL = TOKENIZER.encode("🦙")  # three bytes in one token, then one
[SPACE] = TOKENIZER.encode(" ")


def test_tokens_by_themselves():
    assert [token_text(TOKENIZER, i) for i in (AB, SPACE, EOT)] == ["ab", " ", "<|eot_id|>"]
    assert [token_text(TOKENIZER, i) for i in (*LLAMA, TAIL)] == ["bytes:\\xf0\\x9f\\xa6", "bytes:\\x99"]


def test_no_two_tokens_have_the_same_name():
    names = [token_text(TOKENIZER, i) for i in range(TOKENIZER.vocab_size)]
    assert len(set(names)) == len(names)


def test_chat_form():
    logprobs = [TokenLogprob(TAIL, -3.5, ((AB, -0.25), (EOT, float("-inf"))))]
    assert chat_logprobs(TOKENIZER, logprobs) == {"content": [
        {"token": "bytes:\\x99", "logprob": -3.5, "bytes": [0x99], "top_logprobs": [
            {"token": "ab", "logprob": -0.25, "bytes": [97, 98]},
            {"token": "<|eot_id|>", "logprob": -9999.0, "bytes": list(b"<|eot_id|>")}]}]}


def test_completion_form():
    logprobs = [TokenLogprob(BOS, None), TokenLogprob(AB, -2.0, ((A, -0.5), (SPACE, -1.0))),
                TokenLogprob(A, -0.5, ((A, -0.5), (SPACE, float("-inf"))))]
    assert completion_logprobs(TOKENIZER, logprobs, [0, 0, 2], 1) == {
        "text_offset": [0, 0, 2], "token_logprobs": [None, -2.0, -0.5],
        "tokens": ["<|begin_of_text|>", "ab", "a"],
        "top_logprobs": [None, {"a": -0.5, "ab": -2.0}, {"a": -0.5}]}
    without = completion_logprobs(TOKENIZER, logprobs, [0, 0, 2], 0)
    assert without["top_logprobs"] == [None, {"ab": -2.0}, {"a": -0.5}]
    unlikely = completion_logprobs(TOKENIZER, [TokenLogprob(A, float("-inf"))], [0], 0)
    assert unlikely["token_logprobs"] == [-9999.0]


def test_prompt_form():
    logprobs = [TokenLogprob(BOS, None), TokenLogprob(A, -0.5, ((SPACE, -0.25), (A, -0.5), (AB, -1.0)))]
    assert prompt_logprobs(TOKENIZER, logprobs, 2) == [None, {
        str(A): {"logprob": -0.5, "rank": 2, "decoded_token": "a"},
        str(SPACE): {"logprob": -0.25, "rank": 1, "decoded_token": " "}}]
    assert prompt_logprobs(TOKENIZER, logprobs, 0) == [None, {str(A): {"logprob": -0.5, "rank": None,
                                                                      "decoded_token": "a"}}]


@pytest.mark.parametrize(("ids", "skip", "expected"), [
    ([A, AB, A], True, [0, 1, 3]),
    ([BOS, A, EOT, A], True, [0, 0, 1, 1]),
    ([BOS, A, EOT, A], False, [0, 17, 18, 28]),
    ([A, *LLAMA, TAIL, A], True, [0, 1, 1, 2]),
    ([*LLAMA, A, TAIL, A], True, [0, 1, 2, 3]),  # two incomplete characters, a U+FFFD each
    ([*LLAMA, BOS, TAIL, A], True, [0, 0, 0, 1]),
])  # fmt: skip
def test_offsets(ids, skip, expected):
    offsets = TextOffsets(TOKENIZER, skip)
    assert [offsets.push(token_id) for token_id in ids] == expected


def test_offsets_begin_anew_after_an_end():
    offsets = TextOffsets(TOKENIZER, True)
    assert offsets.push(*LLAMA) == 0
    offsets.end()
    assert [offsets.push(token_id) for token_id in (TAIL, A)] == [1, 2]


_IDS = st.sampled_from([A, AB, *LLAMA, TAIL, BOS, EOT, SPACE, *TOKENIZER.encode("é")])


@given(st.lists(_IDS, max_size=12), st.booleans())
def test_whole_characters_stand_where_the_offset_says(ids, skip):
    offsets, text = TextOffsets(TOKENIZER, skip), TOKENIZER.decode(ids, skip_special_tokens=skip)
    for token_id, offset in [(token_id, offsets.push(token_id)) for token_id in ids]:
        shown = "" if skip and TOKENIZER.is_special(token_id) else token_text(TOKENIZER, token_id)
        assert shown.startswith("bytes:") or text.startswith(shown, offset)
