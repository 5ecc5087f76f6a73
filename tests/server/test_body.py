"""JSON, read strictly."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.body import MAX_DEPTH, read_json
from server.fields import FieldError, place_name

_DATA = st.recursive(
    st.none() | st.booleans() | st.integers(-2**63, 2**64 - 1) | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30)


@given(_DATA, st.booleans())
def test_good_json_is_read_as_the_standard_library_reads_it(data, is_ascii):
    text = json.dumps(data, ensure_ascii=is_ascii)
    try:
        body = text.encode()
    except UnicodeEncodeError:  # lone surrogates can be written as escapes only
        body = json.dumps(data).encode()
    assert read_json(body) == data


@pytest.mark.parametrize(("body", "place", "complaint"), [
    (b"", "", "is not valid JSON: Expecting value in line 1, column 1"),
    (b'{"a":1', "", "is not valid JSON"),
    (b'{"a":1}x', "", "is not valid JSON: Extra data in line 1, column 8"),
    (b"{'a':1}", "", "is not valid JSON"),
    (b'{"a":1,}', "", "is not valid JSON"),
    (b'{"a":"\n"}', "", "is not valid JSON"),
    (b'{"a":01}', "", "is not valid JSON"),
    (b'{"a":+1}', "", "is not valid JSON"),
    (b'{"a":0x1}', "", "is not valid JSON"),
    (b'\xef\xbb\xbf{}', "", "is not valid JSON"),
    (b'{"a":"\xff"}', "", "is not UTF-8 at byte 6"),
    (b'{"a":"\xed\xa0\x80"}', "", "is not UTF-8 at byte 6"),
    ('{"a":1}'.encode("utf-16"), "", "is not UTF-8 at byte 0"),
    (b'NaN', "", "is NaN, which JSON does not have"),
    (b'{"a":[1,{"b":-Infinity}]}', "a[1].b", "is -Infinity, which JSON does not have"),
    (b'{"a":[1,1e999]}', "a[1]", "is too large a number"),
    (b'{"a":' + b"9" * 21 + b"}", "a", "is a number of more than 20 digits"),
    (b'{"a":' + b"9" * 100_000 + b"}", "a", "is a number of more than 20 digits"),
    (b'{"a":1,"b":2,"a":1}', "a", "is given twice"),
    (b'{"a":{"b c":1,"b c":1}}', 'a["b c"]', "is given twice"),
    (b'{"a":1,"\\u0061":2}', "a", "is given twice"),
])  # fmt: skip
def test_what_is_malformed_is_refused_with_its_place(body, place, complaint):
    with pytest.raises(FieldError) as caught:
        read_json(body)
    assert place_name(caught.value.place) == place
    assert str(caught.value).startswith(f"{place or 'the body'} {complaint}")
    assert caught.value.code == "invalid_json"


def _nested(opening: str, closing: str, depth: int) -> bytes:
    return (opening * depth + "1" + closing * depth).encode()


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_has_a_bound(opening, closing):
    read_json(_nested(opening, closing, MAX_DEPTH))
    with pytest.raises(FieldError, match="the body is nested deeper than 64"):
        read_json(_nested(opening, closing, MAX_DEPTH + 1))


def test_brackets_in_strings_and_side_by_side_are_no_nesting():
    text = "[" * 1000 + '\\"' + "{" * 1000
    assert read_json(json.dumps({"a": text, "b": [[]] * 1000, "c": [{}] * 1000}).encode())["a"] == text


@pytest.mark.parametrize("body", [
    "[" * 4_000_000, '{"a":' * 700_000, "[]" * 2_000_000, "[" + "[]," * 1_300_000 + "[]]", "]" * 4_000_000,
    '"' * 4_000_000, '"' + '\\"' * 2_000_000, '[' * 65 + '"' + '\\"' * 1_900_000 + "\\", "[}" * 2_000_000,
    "[" * 65 + '"",' * 1_000_000,
])  # fmt: skip
def test_hostile_bodies_end_soon(body):
    # No timing is asserted: what is quadratic in four megabytes does not end at all.
    try:
        read_json(body)
    except FieldError as error:
        assert error.code == "invalid_json"
