"""llama.completion: events to deltas to completions, ended by the model, a limit or a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.completion import Completion, Delta, GenerationError, RequestReader, SampleReader, Usage
from llama.engine.request import PromptEvent, SamplingParams, TokenEvent, TokenLogprob
from llama.text.tokenizer import Tokenizer
from tests.text.samples import small_tokenizer

TOKENIZER = Tokenizer(small_tokenizer())
EOT = 1


def ids_of(text):
    """One id a byte, so that every border between characters is one between tokens."""
    return [TOKENIZER.encode(chr(byte))[0] if byte < 128 else byte_id(byte) for byte in text.encode()]


def byte_id(byte):
    return next(token_id for token_id in range(3, 259) if TOKENIZER.token_bytes(token_id) == bytes([byte]))


def events(ids, reason="length", stop_reason=None, index=0, logprobs=False):
    """A sample as the engine reports it."""
    last = len(ids) - 1
    return [TokenEvent("r", index, token_id, TokenLogprob(token_id, -0.5) if logprobs else None,
                       *((reason, stop_reason) if place == last else (None, None)))
            for place, token_id in enumerate(ids)]


def read(ids, reason="length", stop_reason=None, **chosen):
    """The deltas up to the end, and the completion."""
    reader = RequestReader(TOKENIZER, SamplingParams(**chosen), 5)
    deltas = []
    for event in events(ids, reason, stop_reason):
        if not reader.is_done:
            deltas.append(reader.read(event))
    assert reader.is_done
    [completion] = reader.completions()
    assert completion.text == "".join(delta.text for delta in deltas)
    assert completion.ids == tuple(token_id for delta in deltas for token_id in delta.ids)
    assert completion.usage.completion_tokens == len(deltas)
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    last = deltas[-1]
    assert (completion.finish_reason, completion.stop_reason) == (last.finish_reason, last.stop_reason)
    return deltas, completion


def outcome(*args, **chosen):
    _, completion = read(*args, **chosen)
    return completion.text, completion.finish_reason, completion.stop_reason, len(completion.ids)


# ---- the end -----------------------------------------------------------------------------------------------


def test_a_limit_ends_with_all_the_text():
    assert outcome(ids_of("hello")) == ("hello", "length", None, 5)


def test_the_models_end_is_no_text():
    assert outcome([*ids_of("hi"), EOT], "stop") == ("hi", "stop", None, 3)
    assert outcome([*ids_of("hi"), EOT], "stop", skip_special_tokens=False) == ("hi", "stop", None, 3)
    assert outcome([*ids_of("hi"), EOT], "stop", include_stop_str_in_output=True) == ("hi", "stop", None, 3)


def test_a_stop_id_is_text_only_where_that_is_asked_for():
    ids = ids_of("hi!")
    stop = ids[-1]
    assert outcome(ids, "stop", stop) == ("hi", "stop", stop, 3)
    assert outcome(ids, "stop", stop, include_stop_str_in_output=True) == ("hi!", "stop", stop, 3)


def test_special_tokens_are_text_only_where_that_is_asked_for():
    ids = [*ids_of("a"), EOT, *ids_of("b")]
    assert outcome(ids) == ("ab", "length", None, 3)
    assert outcome(ids, skip_special_tokens=False) == ("a<|eot_id|>b", "length", None, 3)


def test_a_stop_string_across_tokens_ends_the_sample_where_it_is_complete():
    ids = ids_of("one STOP two")
    deltas, completion = read(ids, stop=("STOP",))
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("one ", "stop", "STOP")
    assert completion.ids == tuple(ids[:8])
    assert [delta.text for delta in deltas] == ["o", "n", "e", " ", "", "", "", ""]
    assert outcome(ids, stop=("STOP",), include_stop_str_in_output=True) == ("one STOP", "stop", "STOP", 8)


def test_what_only_began_like_a_stop_string_is_given_after_all():
    deltas, completion = read(ids_of("one STO two"), stop=("STOP",))
    assert completion.text == "one STO two"
    assert [delta.text for delta in deltas[4:8]] == ["", "", "", "STO "]
    assert outcome(ids_of("one STO"), stop=("STOP",)) == ("one STO", "length", None, 7)
    assert outcome([*ids_of("one STO"), EOT], "stop", stop=("STOP",)) == ("one STO", "stop", None, 8)


def test_a_stop_string_in_the_last_token_is_a_stop_and_no_length():
    assert outcome(ids_of("a STOP"), stop=("STOP",)) == ("a ", "stop", "STOP", 6)


def test_a_stop_string_inside_one_token():
    [abab] = TOKENIZER.encode("abab")
    assert outcome([abab, abab], stop=("ba",)) == ("a", "stop", "ba", 1)


def test_half_a_character_waits_for_the_rest():
    deltas, completion = read(ids_of("a🦙é"))
    assert [delta.text for delta in deltas] == ["a", "", "", "", "🦙", "", "é"]
    assert outcome(ids_of("a🦙")[:-1]) == ("a\ufffd", "length", None, 4)


@given(st.text("ab🦙ST", max_size=20), st.text("ab🦙ST", min_size=1, max_size=3), st.booleans())
def test_text_and_tokens_end_together(text, stop, include):
    text += "."
    found, _, stop_reason, num_ids = outcome(ids_of(text), stop=(stop,), include_stop_str_in_output=include)
    if stop in text:
        end = text.index(stop) + len(stop)
        assert found == text[:end if include else end - len(stop)] and stop_reason == stop
        assert num_ids == len(text[:end].encode())
    else:
        assert found == text and stop_reason is None and num_ids == len(text.encode())


# ---- many samples ------------------------------------------------------------------------------------------


def test_samples_are_folded_apart_and_in_order():
    reader = RequestReader(TOKENIZER, SamplingParams(n=3, stop=("c",)), 7)
    texts = ("abab", "abcd", "ba")
    samples = [events(ids_of(text), index=index) for index, text in enumerate(texts)]
    for place in range(4):
        for index in (2, 0, 1):
            if place < len(samples[index]):
                delta = reader.read(samples[index][place])
                assert (delta is None) == (index == 1 and place == 3)  # after its stop string
                assert delta is None or delta.index == index
        assert reader.is_done == (place == 3)
    assert [(one.text, one.finish_reason, one.stop_reason, one.usage) for one in reader.completions()] == [
        ("abab", "length", None, Usage(7, 4)),
        ("ab", "stop", "c", Usage(7, 3)),
        ("ba", "length", None, Usage(7, 2)),
    ]


def test_the_prompts_events_are_gathered():
    reader = RequestReader(TOKENIZER, SamplingParams(prompt_logprobs=0, logprobs=1), 4)
    pieces = [TokenLogprob(3, None), TokenLogprob(4, -1.0), TokenLogprob(5, -2.0)]
    assert reader.read(PromptEvent("r", tuple(pieces[:1]), num_cached=2)) is None
    assert reader.read(PromptEvent("r", tuple(pieces[1:]))) is None
    [event] = events(ids_of("a"), logprobs=True)
    assert reader.read(event) == Delta(0, "a", (event.token_id,), (event.logprob,), "length", None)
    [completion] = reader.completions()
    assert completion == Completion("a", (event.token_id,), "length", None, (event.logprob,), tuple(pieces),
                                    Usage(4, 1, 2))
    assert completion.usage.total_tokens == 5


def test_log_probabilities_that_were_not_asked_for_are_none():
    _, completion = read(ids_of("ab"))
    assert completion.logprobs is None and completion.prompt_logprobs is None


# ---- errors ------------------------------------------------------------------------------------------------


def test_an_error_of_the_engine_is_raised_in_its_words():
    reader = RequestReader(TOKENIZER, SamplingParams(), 1)
    with pytest.raises(GenerationError, match="the engine process was lost"):
        reader.read(TokenEvent("r", 0, None, finish_reason="error", error="the engine process was lost"))


def test_a_sample_that_has_ended_is_not_read_on():
    reader = SampleReader(TOKENIZER, SamplingParams(), 0)
    [event] = events(ids_of("a"))
    reader.read(event)
    with pytest.raises(AssertionError, match="the sample has ended"):
        reader.read(event)


def test_a_stop_string_does_not_stop_before_min_tokens():
    assert outcome(ids_of("ababab"), stop=("b",), min_tokens=3) == ("aba", "stop", "b", 4)
    assert outcome(ids_of("aaaa"), stop=("aa",), min_tokens=3) == ("aa", "stop", "aa", 4)
