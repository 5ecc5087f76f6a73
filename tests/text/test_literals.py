"""Arguments as models write them, against Python's own readers of JSON and of Python."""

import ast
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama.text.literals import is_json_object, python_calls

_SCALARS = st.none() | st.booleans() | st.integers(-2**80, 2**80) | st.text(max_size=6) \
    | st.floats(allow_nan=False, allow_infinity=False)
_VALUES = st.recursive(_SCALARS, lambda each: st.lists(each, max_size=3)
                       | st.dictionaries(st.text(max_size=3), each, max_size=3), max_leaves=8)
_ARGUMENTS = st.dictionaries(st.from_regex(r"[a-z_][a-zA-Z0-9_]{0,4}", fullmatch=True), _VALUES, max_size=3)


@given(st.lists(st.tuples(st.sampled_from(["f", "get_x", "a-b.c"]), _ARGUMENTS), min_size=1, max_size=3))
def test_what_python_writes_is_read(calls):
    """repr of every value, which Python itself reads back as the same."""
    texts = [f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})"
             for name, given in calls]
    found = python_calls(f"[{', '.join(texts)}]")
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls
    assert [list(json.loads(arguments)) for _, arguments in found] == [list(given) for _, given in calls]


_PIECES = ["f(", "a=", "b=", "1", "-", ".5", "1.", "1e5", "0", "7", "_", "'", '"', "\\", "n", "x41", "u00e9",
           "é", "[", "]", "{", "}", ")", ",", ":", " ", "\n", "True", "None", "x"]
_TEXTS = st.lists(st.sampled_from(_PIECES), max_size=8).map(lambda parts: "[f(a=" + "".join(parts))


@given(_TEXTS | _TEXTS.map(lambda text: text + ")]"))
def test_what_is_read_is_what_python_reads(text):
    """Of all that looks like calls, nothing is read as what it is not."""
    found = python_calls(text)
    if found is None:
        return
    calls = ast.parse(text.strip(), mode="eval").body.elts
    assert [(name, json.loads(arguments)) for name, arguments in found] == [
        (call.func.id, {each.arg: ast.literal_eval(each.value) for each in call.keywords}) for call in calls]


@pytest.mark.parametrize(("value", "expected"), [
    ("'it''s'", None), (r"'it\'s'", "it's"), (r'"a\n\t\\\x41\u00e9\U0001f999\q"', "a\n\t\\Aé🦙\\q"),
    (r"'\U00110000'", None), (r"'\ud800'", "\ufffd"), ("'a\\\nb'", "ab"),
    ("true", True), ("false", False), ("null", None), ("[1, [2], {'a': {}}, ]", [1, [2], {"a": {}}]),
    ("1_000", None), ("007", None), ("+1", None), ("0x10", None), ("1e999", None), ("9" * 5000, None),
    ("(1, 2)", None), ("{1: 2}", None), ("{'a': 1, 'a': 2}", None), ("{'a'}", None), ("f'x'", None),
    ("b'x'", None),
    ("1 + 1", None), ("x", None), ("[x]", None), ("g()", None), ("'\\", None), ("", None), ("1 2", None),
    ("*x", None),
])  # fmt: skip
def test_values(value, expected):
    found = python_calls(f"[f(a={value})]")
    if expected is None and value != "null":
        assert found is None
    else:
        assert [(name, json.loads(arguments)) for name, arguments in found] == [("f", {"a": expected})]


@pytest.mark.parametrize("text", ["", "[]", "[f]", "f(a=1)", "[f(1)]", "[f(a=1)", "[f(a=1)]]", "[f(a=1)] x",
                                  "[f(a=1, a=2)]",
                                  "[f(,)]", "[f(), , f()]", "[(f(),)]", '{"f": f()}', '[{"f": {"a": 1}}]',
                                  "[f('a': 1)]",
                                  "[f(a=1), 42]", "[f(a=1}, 'g': {'b': 2)]", "[f(a=1]]", "[f()()]",
                                  "[f.(a=1) # x\n]"])  # fmt: skip
def test_what_is_no_list_of_calls(text):
    assert python_calls(text) is None


@pytest.mark.parametrize(("text", "expected"), [
    ("{}", True), (' {"a": [1, -0.5e3, null, true, "\\u00e9\\ud800"]}\n', True), ("[]", False), ("1", False),
    ("", False),
    ("{a: 1}", False), ("{'a': 1}", False), ('{"a": 1,}', False), ('{"a": 1} {}', False),
    ('{"a": NaN}', False),
    ('{"a": -Infinity}', False), ('{"a": 1e999}', False), ('{"a": 01}', False), ('{"a": 1, "a": 1}', False),
    ('{"a": {"b": 1, "b": 2}}', False), ('{"a": "\n"}', False), ('{"a": "\\x41"}', False),
    ('{"a": ' + "9" * 5000 + "}", False),
])  # fmt: skip
def test_json_objects(text, expected):
    assert is_json_object(text) is expected
