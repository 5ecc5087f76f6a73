"""llama.text.stream against Tokenizer.decode and against a search of the whole text."""

import codecs
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.text.stream import TextStream
from llama.text.tokenizer import Tokenizer, TokenizerError
from tests.text.samples import random_text, small_tokenizer

SMALL = Tokenizer(small_tokenizer())
ids_of_any_kind = st.lists(st.integers(0, SMALL.vocab_size - 1), max_size=40)
# Ids that make and break characters and stop strings: letters, a llama in pieces, special tokens.
LETTERS = [token_id for text in ("a", "b", "ab", "abab", "ba") for token_id in SMALL.encode(text)]
LLAMA = SMALL.encode("🦙")
lively_ids = st.lists(st.sampled_from([*LETTERS, *LETTERS, *LLAMA, 0, 1]), max_size=40)
stops = st.lists(st.text(alphabet="ab🦙<|\ufffd", min_size=1, max_size=5), min_size=1, max_size=4)


def deltas(stream, ids):
    return [*map(stream.push, ids), stream.finish()]


def first_stop(text, stop):
    """The stop string that is complete first in `text`, the longest of equals, and where it ends."""
    for end in range(len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            return max(found, key=len), end
    return None, len(text)


def longest_beginning(text, stop):
    """How many characters at the end of `text` may be the beginning of a stop string."""
    lengths = (n for string in stop for n in range(len(string)) if text.endswith(string[:n]))
    return max(lengths, default=0)


@given(ids_of_any_kind, st.booleans())
def test_the_deltas_are_the_decoded_text(ids, skip):
    stream = TextStream(SMALL, skip_special_tokens=skip)
    expected = SMALL.decode(ids, skip_special_tokens=skip)
    assert "".join(deltas(stream, ids)) == expected
    assert stream.text == expected
    assert stream.stop_match is None


def test_the_deltas_are_the_decoded_text_in_the_real_vocabulary(tokenizer):
    rng = random.Random(3)
    for _ in range(300):
        text = random_text(rng)
        ids = tokenizer.encode(text)
        assert "".join(deltas(TextStream(tokenizer), ids)) == text
        torn = [*ids[1:], *(rng.randrange(tokenizer.vocab_size) for _ in range(20)), *ids[:-1]]
        assert "".join(deltas(TextStream(tokenizer), torn)) == tokenizer.decode(torn)


def test_never_half_a_character(tokenizer):
    text = "👩‍👩‍👧‍👦🦙𓀀é漢"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # characters are split between tokens
    pieces = deltas(TextStream(tokenizer), ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[0] == ""


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character():
    stream = TextStream(SMALL)
    assert [stream.push(i) for i in LLAMA[:-1]] == [""] * (len(LLAMA) - 1)
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    assert stream.text == "\ufffd"


@given(lively_ids, stops, st.booleans(), st.booleans())
def test_text_ends_at_the_stop_string_that_is_complete_first(ids, stop, include_stop, skip):
    stream = TextStream(SMALL, stop=stop, include_stop=include_stop, skip_special_tokens=skip)
    joined = "".join(deltas(stream, ids))
    text = SMALL.decode(ids, skip_special_tokens=skip)
    match, end = first_stop(text, stop)
    assert stream.stop_match == match
    assert joined == stream.text == text[: end - (len(match) if match and not include_stop else 0)]


@given(lively_ids, stops)
def test_text_is_held_back_only_while_it_may_become_a_stop_string(ids, stop):
    stream = TextStream(SMALL, stop=stop)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoded = ""
    for token_id in ids:
        stream.push(token_id)
        decoded += decoder.decode(b"" if SMALL.is_special(token_id) else SMALL.token_bytes(token_id))
        if stream.stop_match:
            break
        assert stream.text == decoded[: len(decoded) - longest_beginning(decoded, stop)]


def test_a_stop_string_across_tokens():
    a, b = SMALL.encode("a") + SMALL.encode("b")
    stream = TextStream(SMALL, stop=["aab"])
    assert [stream.push(i) for i in (b, a, a, a, b, b)] == ["b", "", "", "a", "", ""]
    assert stream.stop_match == "aab"
    assert stream.finish() == ""
    assert stream.text == "ba"


def test_a_beginning_of_a_stop_string_is_not_lost_at_the_end():
    stream = TextStream(SMALL, stop=["abc"])
    assert deltas(stream, SMALL.encode("xab")) == ["x", "", "ab"]
    assert stream.stop_match is None


def test_of_stop_strings_that_end_together_the_longest_is_cut():
    ids = SMALL.encode("xaby")
    for stop in (["b", "ab"], ["ab", "b"]):
        stream = TextStream(SMALL, stop=stop)
        assert "".join(deltas(stream, ids)) == "x"
        assert stream.stop_match == "ab"


def test_special_tokens_are_seen_by_stop_strings_only_where_they_are_text():
    ids = [*SMALL.encode("x"), SMALL.token_id("<|eot_id|>"), *SMALL.encode("y")]
    assert "".join(deltas(TextStream(SMALL, stop=["<|eot_id|>"], skip_special_tokens=False), ids)) == "x"
    assert "".join(deltas(TextStream(SMALL, stop=["<|eot_id|>"]), ids)) == "xy"
    assert "".join(deltas(TextStream(SMALL, stop=["xy"]), ids)) == ""


def test_a_long_text_with_a_long_stop_string_held_back_throughout():
    stream = TextStream(SMALL, stop=["a" * 50_000 + "b", "c" * 100])
    (a,) = SMALL.encode("a")
    emitted = [stream.push(a) for _ in range(120_000)]
    assert emitted[:50_000] == [""] * 50_000
    assert emitted[50_000:] == ["a"] * 70_000
    stream.push(SMALL.encode("b")[0])
    assert stream.stop_match == "a" * 50_000 + "b"
    assert stream.text == "a" * 70_000


def test_after_finish_nothing_more_is_emitted():
    stream = TextStream(SMALL)
    assert deltas(stream, SMALL.encode("x")) == ["x", ""]
    assert stream.push(SMALL.encode("y")[0]) == ""
    assert stream.text == "x"


@pytest.mark.parametrize("stop", ["end", ["end", ""], [3]])
def test_bad_stop_strings_are_refused(stop):
    with pytest.raises(ValueError, match="stop must be a list of strings, none of them empty"):
        TextStream(SMALL, stop=stop)


def test_an_unknown_id_is_an_error():
    with pytest.raises(TokenizerError, match="token id 100000 is not in the vocabulary"):
        TextStream(SMALL).push(100_000)
