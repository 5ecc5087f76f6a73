"""Every row of the contract's table of fields at its bounds, and the types against JSON Schema's own."""

import functools
import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.fields import (
    AnyOf,
    Array,
    Boolean,
    Choice,
    FieldError,
    Integer,
    Null,
    Number,
    Refused,
    String,
    place_name,
    shown,
)
from server.objects import AnyObject, Field, Map, Object, ObjectText, TokenKey
from server.protocol import ApiError, parse_chat, parse_completion
from tests.server.samples import CONTEXT, NAME, VOCAB, chat_body, completion_body, make_served

SERVED = make_served()
TOOLS = [{"type": "function", "function": {"name": "f"}}]
HI = {"role": "user", "content": "Hi"}
LOGPROBS, STREAM, WITH_TOOLS = {"logprobs": True}, {"stream": True}, {"tools": TOOLS}

# fmt: off
# A row each: field, values just inside, values just outside; last, what the field needs besides.
SHARED = [
    ("model", [NAME], ["", "x" * 257, 1]),
    ("temperature", [0, 0.0, 1e-300, 2, 2.0], [-1e-9, 2.0000001]),
    ("top_p", [1e-9, 1, 1.0], [0, 0.0, -0.1, 1.0000001]),
    ("top_k", [-1, 1, 2**31 - 1, 5.0], [-2, 0, 2**31, 1.5]),
    ("min_p", [0, 1], [-1e-9, 1.0000001]),
    ("frequency_penalty", [-2, 2], [-2.0000001, 2.0000001]),
    ("presence_penalty", [-2, 2], [-2.0000001, 2.0000001]),
    ("repetition_penalty", [1e-9, 2], [0, -1, 2.0000001]),
    ("logit_bias", [{}, {"0": -100}, {str(VOCAB - 1): 100}, {"1": 0.5}],
     [{str(VOCAB): 0}, {"-1": 0}, {"01": 0}, {"x": 0}, {"": 0}, {"٣": 0}, {"0": 100.1}, {"0": -100.1},
      {"0": None}]),
    ("seed", [-2**63, 0, 2**64 - 1], [-2**63 - 1, 2**64]),
    ("stop", ["x", "x" * 1024, [], ["x"] * 16], ["", "x" * 1025, ["x"] * 17, ["x", ""], [1]]),
    ("stop_token_ids", [[], [0, VOCAB - 1], [1] * 256], [[VOCAB], [-1], [1] * 257, ["1"], 1]),
    ("ignore_eos", [True, False], []),
    ("min_tokens", [0, 1], [-1, 2**31]),
    ("include_stop_str_in_output", [True, False], []),
    ("skip_special_tokens", [True, False], []),
    ("n", [1, 16], [0, 17]),
    ("prompt_logprobs", [0, 20], [-1, 21, True]),
    ("stream", [True, False], []),
    ("stream_options", [{}, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}],
     [{"usage": True}, {"include_usage": 1}, {"continuous_usage_stats": "x"},
      {"continuous_usage_stats": True}], STREAM),
    ("user", ["", "x" * 512], ["x" * 513]),
    ("metadata", [{}, {"k": "v"}, {"k" * 64: "v" * 512}, {str(i): "" for i in range(16)}],
     [{str(i): "" for i in range(17)}, {"k" * 65: ""}, {"k": "v" * 513}, {"k": 1}]),
    ("store", [True, False], []),
    ("service_tier", ["auto"], [1]),
    ("safety_identifier", ["x"], [1]),
    ("prompt_cache_key", ["x"], [1]),
]
GUIDED = [
    ("guided_json", [{"type": "object"}, '{"type":"integer"}', {}], [1, "x", {"type": "x"}, {"x": 1}, []]),
    ("guided_regex", ["[0-9]+"], ["", 1, "("]),
    ("guided_choice", [["a"], ["a", "b"]], [[], [""], "a", [1], ["a"] * 4097]),
    ("guided_grammar", ['start: "a"'], ["", "x", 1]),
]
TRACE = ("x_trace", [None], [{}, {"capture": ["embed"]}, [], "embed", 1])  # this server has no --enable-trace

CHAT = [
    TRACE,
    ("messages", [[HI], [HI] * 32, *([{"role": role, "content": "x"}] for role in
                                     ("system", "user", "assistant", "tool", "ipython", "developer")),
                  [HI | {"content": None}], [HI | {"content": [{"type": "text", "text": ""}] * 1024}],
                  [HI | {"name": "Ann"}], [HI | {"refusal": None, "audio": None, "annotations": []}],
                  [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function":
                                                         {"name": "f", "arguments": '{"a":1}'}}]}],
                  [{"role": "tool", "tool_call_id": "1", "content": "3"}]],
     [[], "Hi", [HI] * 8193, [1], [{}], [{"content": "x"}], [{"role": "user"}], [HI | {"role": "me"}],
      [HI | {"content": 1}], [HI | {"content": [{"type": "text", "text": ""}] * 1025}],
      [HI | {"content": ["x"]}],
      [HI | {"content": [{"type": "image_url", "image_url": {}}]}], [HI | {"x": 1}],
      [HI | {"tool_calls": [{}]}],
      [HI | {"refusal": "no"}]]),
    ("max_tokens", [1, 400], [0, -1, CONTEXT, 2**31]),
    ("max_completion_tokens", [1, 400], [0, -1, CONTEXT, 2**31]),
    ("logprobs", [True, False], [2]),
    ("top_logprobs", [0, 20], [-1, 21, True], LOGPROBS),
    ("tools", [[], TOOLS, TOOLS * 128, [{"type": "function", "function": {"name": "f" * 64, "strict": False,
                                                                        "parameters": {"type": "object"}}}],
               [{"type": "function", "function": {"name": "f", "strict": True}}]],
     [TOOLS * 129, [1], [{"type": "function"}], [{"type": "x", "function": {"name": "f"}}],
      [{"type": "function", "function": {"name": "f" * 65}}],
      [{"type": "function", "function": {"name": "a b"}}],
      [{"type": "function", "function": {"name": "f", "strict": 1}}], {}]),
    ("tool_choice", ["none", "auto", "required", {"type": "function", "function": {"name": "f"}}],
     ["f", 1, {"type": "function", "function": {}}, {"type": "function", "function": {"name": "other"}}], WITH_TOOLS),
    ("parallel_tool_calls", [True, False], [1], WITH_TOOLS),
    ("response_format", [{"type": "text"}, {"type": "json_object"},
                         {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": True}}],
     [{}, {"type": "x"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {}}, "text"]),
    *GUIDED,
    ("echo", [False], [True]),
    ("echo", [True, False], [], {"continue_final_message": True}),
    ("add_generation_prompt", [True, False], []),
    ("continue_final_message", [True, False], []),
]
COMPLETION = [
    ("prompt", ["", "x", ["x"] * 1024, [0, VOCAB - 1], [1] * (CONTEXT - 16), [[1]] * 1024],
     [[], [[]], [-1], [VOCAB], [1.5], [True], [1, "x"], ["x", 1], [[1], ["x"]], [[1], [VOCAB]], ["x"] * 1025,
      [[1]] * 1025, [1] * CONTEXT, [1] * (CONTEXT + 1), {}, 1]),
    ("suffix", [None], ["", "x", 1]),
    TRACE,
    ("response_format", [{"type": "text"}, {"type": "json_object"}], [{}]),
    *GUIDED,
    ("max_tokens", [1, 400], [-1, 0, CONTEXT, 2**31]),
    ("max_tokens", [0, 1], [-1], {"echo": True}),
    ("logprobs", [0, 20], [-1, 21, True]),
    ("echo", [True, False], []),
]
# fmt: on
ENDPOINTS = {
    "chat": (parse_chat, chat_body, SHARED + CHAT),
    "completion": (parse_completion, completion_body, SHARED + COMPLETION),
}


def _cases(which: int):
    for endpoint, (_, _, rows) in ENDPOINTS.items():
        for name, *values in rows:
            besides = values[2] if len(values) == 3 else {}
            yield from (
                pytest.param(endpoint, name, value, besides, id=f"{endpoint}-{name}-{json.dumps(value)[:40]}")
                for value in values[which]
            )


@pytest.mark.parametrize(("endpoint", "name", "value", "besides"), list(_cases(0)))
def test_what_is_within_a_fields_bounds_is_taken(endpoint, name, value, besides):
    parse, body, _ = ENDPOINTS[endpoint]
    parse(body(**besides | {name: value}), SERVED)


@pytest.mark.parametrize(("endpoint", "name", "value", "besides"), list(_cases(1)))
def test_what_is_beyond_a_fields_bounds_is_refused(endpoint, name, value, besides):
    parse, body, _ = ENDPOINTS[endpoint]
    with pytest.raises(ApiError) as caught:
        parse(body(**besides | {name: value}), SERVED)
    assert caught.value.status == 400
    assert caught.value.param.startswith(name)
    assert name in caught.value.message


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_field_of_the_table_has_its_row_here(endpoint):
    table = SERVED.chat_request if endpoint == "chat" else SERVED.completion_request
    assert set(table.fields) == {name for name, *_ in ENDPOINTS[endpoint][2]}


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_null_is_absence_for_every_field_that_is_not_required(endpoint):
    parse, body, rows = ENDPOINTS[endpoint]
    required = {"messages", "prompt"}
    nulls = {name: None for name, *_ in rows if name not in required}
    assert parse(body(**nulls), SERVED) == parse(body(), SERVED)
    for name in required & {name for name, *_ in rows}:
        with pytest.raises(ApiError, match=f"{name} must be .* not null"):
            parse(body(**{name: None}), SERVED)


# ---- the types themselves, with JSON Schema's validator as the oracle ----------------------------------

# fmt: off
_OBJECT = Object({"a": Field(Integer(0, 3), required=True), "b": Field(Boolean()), "c": Field(Null()),
                  "d": Field(AnyOf((Null(), String())), has_null=True), "e": Field(Choice(("x", "y")))})
TYPES = [
    Null(), Boolean(), Number(0, 1), Number(0, 1, above_low=True), Integer(-1, 3), String(),
    String(1, 2), String(pattern="[ab]*"), Choice(("a", "b")), AnyObject(), _OBJECT,
    Array(_OBJECT, 0, 2, "items"),
    Map(String(1, 1), Number(-1, 1), 2), Array(Integer(0, 1), 1, 2, "bits"),
    AnyOf((Null(), Integer(0, 2), Array(Array(Boolean(), 0, 1, "flags"), 0, 2, "lists"))),
]
_SCALARS = (st.none() | st.booleans() | st.integers(-3, 5)
            | st.sampled_from([0.5, -0.5, 1.0, 2.0, 1.5, 0.0, -1.0])
            | st.sampled_from(["", "a", "b", "ab", "abc", "x", "é", "🦙", "🦙🦙", "🦙🦙🦙"]))
_VALUES = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abcdex"), inner, max_size=4)
    | st.fixed_dictionaries({"a": st.integers(0, 3)},
                            optional={"b": inner, "c": st.none(), "d": inner, "e": inner}), max_leaves=8)
# fmt: on


@functools.cache
def _validator(index: int) -> jsonschema.Draft202012Validator:
    schema = TYPES[index].schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@given(st.integers(0, len(TYPES) - 1), _VALUES)
def test_a_type_takes_what_its_schema_takes(index, value):
    try:
        TYPES[index].check(value, ("x",))
        taken = True
    except FieldError as error:
        taken = False
        assert error.place[0] == "x"
    assert taken == _validator(index).is_valid(value)


@pytest.mark.parametrize(("type", "value", "message"), [
    (Boolean(), 1, "x must be true or false, not 1"),
    (Number(0, 2), True, "x must be a number from 0 to 2, not true"),
    (Number(0, 1, above_low=True), 0, "x must be a number above 0 and at most 1, not 0"),
    (Integer(1, 9), "1", 'x must be an integer from 1 to 9, not "1"'),
    (Integer(1, 9), 1.5, "x must be an integer from 1 to 9, not 1.5"),
    (String(1), "", 'x must be a string that is not empty, not ""'),
    (String(1, 2), "abc", 'x must be a string of 1 to 2 characters, not "abc"'),
    (String(pattern="a+"), "b\n", 'x must be a string that matches a+, not "b\\n"'),
    (String(0, 99), "y" * 1000, f'x must be a string of 0 to 99 characters, not "{"y" * 64}…"'),
    (Choice(("a", "b")), None, 'x must be one of "a", "b", not null'),
    (Array(String(), 0, 1, "names"), ["a", "b"], "x must be an array of 0 to 1 names, not an array of 2"),
    (Array(String(), 0, 1, "names"), [{}], "x[0] must be a string, not an object"),
    (AnyOf((Integer(-1, -1), Integer(1, 5))), 0, "x must be -1, or an integer from 1 to 5, not 0"),
    (AnyOf((String(1), Array(String(1), 0, 2, "names"))), ["a", ""],
     'x[1] must be a string that is not empty, not ""'),
    (AnyOf((Null(), Refused(Boolean(), " yet"))), True, "x true is not supported yet"),
    (AnyOf((Null(), Refused(Boolean(), " yet"))), 1, "x must be null, not 1"),
    (AnyObject(), [], "x must be an object, not an array of 0"),
    (Map(String(1), Boolean(), 1), {"a": True, "b": True},
     "x must be an object of at most 1 entries, not of 2"),
    (Map(TokenKey(5), Boolean(), 1), {"5": True}, "x.5 is a wrong key: it must be a token id from 0 to 4"),
    (_OBJECT, {"a": 1, "z": 1}, "x.z is not a field that this server knows; leave it out"),
    (_OBJECT, {"b": True}, "x.a is missing"),
    (ObjectText(), "{",
     "x is not valid JSON: Expecting property name enclosed in double quotes in line 1, column 2"),
    (ObjectText(), '{"a":{"b":NaN}}', "x.a.b is NaN, which JSON does not have"),
    (ObjectText(), "[1]", 'x must be a JSON object in a string, not "[1]"'),
    (ObjectText(), "[" * 100, "x is nested deeper than 64"),
])  # fmt: skip
def test_errors_say_what_was_expected(type, value, message):
    with pytest.raises(FieldError) as caught:
        type.check(value, ("x",))
    assert str(caught.value) == message


def test_values_come_out_as_the_kind_that_was_asked_for():
    assert [str(Integer(0, 9).check(value, ())) for value in (3, 3.0)] == ["3", "3"]
    assert str(Number(0, 9).check(3, ())) == "3.0"
    assert Map(TokenKey(9), Number(0, 9), 9).check({"7": 1}, ()) == {7: 1.0}
    assert ObjectText().check("", ()) == {}
    assert list(_OBJECT.check({"d": None, "b": None, "a": 1}, ())) == [
        "d",
        "a",
    ]  # in the order in which they came


def test_objects_are_read_with_their_defaults():
    table = Object({"a": Field(Integer(0, 3), default=2), "b": Field(Boolean())})
    assert table.read({}) == {"a": 2, "b": None}
    assert table.read({"a": 1, "b": None}) == {"a": 1, "b": None}


def test_places_are_short_and_on_one_line():
    assert place_name(("messages", 3, "content", 0, "type")) == "messages[3].content[0].type"
    assert place_name(("metadata", "a\nb")) == 'metadata["a\\nb"]'
    assert place_name(("",)) == '[""]'
    assert place_name(("x" * 100,)) == f'["{"x" * 64}…"]'
    assert place_name(()) == ""
    assert shown('a"\n') == '"a\\"\\n"'
