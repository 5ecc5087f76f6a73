"""Calls that a grammar makes: told as they grow, the same however they come in pieces, and what the grammar allows."""

import json
import random

import pytest

from llama.text.certain import CertainCallStream, MoreArguments
from llama.text.guidance import GrammarError
from llama.text.matcher import GrammarCompiler
from llama.text.toolgrammar import call_or_json, calls
from llama.text.tools import ToolCall
from tests.text.walks import accepts, walk

EOS = "<|eot_id|>"
ANY = {"type": "object"}


def tool(name, parameters=ANY, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


def call(name, arguments):
    return f'{{"name": "{name}", "parameters": {arguments}}}'


def read(pieces, names=("f", "fg")):
    """What the pieces bring, each by itself, and at last what the end brings."""
    stream = CertainCallStream(names)
    brought = [stream.push(piece) for piece in pieces]
    return [*brought, stream.finish(is_cut=False)], stream.is_open


def told(brought):
    """The text, and the calls with all of their arguments."""
    text, found = "", []
    for each in sum(brought, []):
        if isinstance(each, str):
            text += each
        elif isinstance(each, ToolCall):
            assert each.arguments == ""
            found.append([each.name, ""])
        else:
            found[-1][1] += each.text
    return text, [tuple(each) for each in found]


ARGUMENTS = ["{}", '{"a": 1}', '{"a": "}", "b": {"c": [{}, "\\"}{"]}}', '{"é🦙": "\\\\"}', '{"a": "\\\\\\""}']
REPLIES = [
    *((call("f", each), "", [("f", each)]) for each in ARGUMENTS),
    (f'{call("f", "{}")}; {call("fg", ARGUMENTS[2])}; {call("f", "{}")}', "",
     [("f", "{}"), ("fg", ARGUMENTS[2]), ("f", "{}")]),
    ("Hello.", "Hello.", []), ("", "", []), ('{"name": "Bob"}', '{"name": "Bob"}', []), ("{", "{", []),
    ("{ }", "{ }", []), (" ", " ", []), (' {"name": "f"', ' {"name": "f"', []),
    ('{"name": "f", "parameters"', '{"name": "f", "parameters"', []),
    ('{"name": "h", "parameters": {}}', '{"name": "h", "parameters": {}}', []),
    (f"Hi\n{call('f', '{}')}", f"Hi\n{call('f', '{}')}", []),
    (f'{call("f", "{}")}; {{"name": "f', '; {"name": "f', [("f", "{}")]),
]


@pytest.mark.parametrize("number", range(len(REPLIES)))
def test_the_same_is_told_however_a_reply_is_cut(number):
    reply, text, found = REPLIES[number]
    assert told(read([reply])[0]) == told(read(list(reply))[0]) == (text, found)
    for cut in range(len(reply) + 1):
        brought, is_open = read([reply[:cut], reply[cut:]])
        assert told(brought) == (text, found) and not is_open


def test_a_call_is_told_from_its_beginning_and_its_arguments_as_they_grow():
    brought, _ = read(['{"name": "f', '", "parameters": ', '{"a', '": "x', 'y"}', "}"])
    assert brought == [[], [ToolCall("f", "")], [MoreArguments('{"a')], [MoreArguments('": "x')], [MoreArguments('y"}')],
                       [], []]


def test_text_is_told_as_soon_as_it_is_no_call():
    assert read(["{", '"na', "x", "y"])[0] == [[], [], ['{"nax'], ["y"], []]


def test_a_call_that_is_cut_is_open():
    reply = call("f", '{"a": "x"}')
    for cut in range(len(reply)):
        brought, is_open = read([reply[:cut]])
        text, found = told(brought)
        began = cut >= len('{"name": "f", "parameters":')
        assert is_open == began
        assert (text, found) == (("", [("f", reply[28:min(cut, 38)])]) if began else (reply[:cut], []))


# ---- the grammar ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiler(small) -> GrammarCompiler:
    return GrammarCompiler(small, (small.token_id(EOS),))


CITY = {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}, "required": ["city"],
        "additionalProperties": False}
TOOLS = [tool("f", CITY), tool("fg"), {"type": "function", "function": {"name": "none"}}]
PLACES = ["tools[0]", "tools[1]", "tools[2]"]
GOOD = [call("f", '{"city": "Zürich"}'), call("f", '{"city": "x", "n": 3}'), call("fg", '{"x": [1, {}]}'), call("none", "{}")]
BAD = [call("f", "{}"), call("f", '{"city": 1}'), call("f", '{"city":"x"}'), call("f", '{"city": "x", "z": 1}'),
       call("none", '{"a": 1}'), call("x", "{}"), f" {GOOD[0]}", f"{GOOD[0]} ", '{"parameters": {}, "name": "fg"}']


def test_one_call_of_the_tools_and_nothing_else(small, compiler):
    written = calls(TOOLS, PLACES, most=1)
    assert [text for text in GOOD if not accepts(compiler, small, written, text)] == []
    wrong = [*BAD, "Hi", "", f"{GOOD[0]}; {GOOD[0]}"]
    assert [text for text in wrong if accepts(compiler, small, written, text)] == []


def test_several_calls(small, compiler):
    written = calls(TOOLS, PLACES, most=3)
    for count, fits in ((1, True), (2, True), (3, True), (4, False)):
        assert accepts(compiler, small, written, "; ".join([*GOOD, *GOOD][:count])) == fits
    assert not accepts(compiler, small, written, f"{GOOD[0]};{GOOD[0]}")


def test_a_call_or_any_text_that_does_not_begin_like_one(small, compiler):
    written = calls(TOOLS, PLACES, must_call=False)
    texts = ["Hi", "", "{", '{"name"', '{"names": 1}', "[1]\n{}", f"Hi\n{BAD[0]}", '{"name": 1}', "é🦙\n", "{}", "{ }"]
    assert [text for text in GOOD + texts if not accepts(compiler, small, written, text)] == []
    wrong = [each for each in BAD if each.startswith('{"name": ')]
    wrong += [" " + each for each in wrong] + [each.replace('": "', '":"').replace("{", "{ ") for each in wrong]
    assert [text for text in [*wrong, '{"name": "', '{"name": "Bob"}'] if accepts(compiler, small, written, text)] == []
    assert all(told(read([text], ["f", "fg", "none", "x"])[0]) == (text, []) for text in texts)


def test_only_strict_schemas_are_followed_where_nothing_makes_the_call(small, compiler):
    tools = [tool("f", CITY, strict=True), tool("fg", CITY)]
    written = calls(tools, PLACES[:2], must_call=False, only_strict=True)
    assert accepts(compiler, small, written, call("fg", '{"city": 1}'))
    assert not accepts(compiler, small, written, call("f", '{"city": 1}'))


def test_a_call_or_json_that_satisfies_a_schema(small, compiler):
    content = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"],
               "additionalProperties": False}
    strict = [tool("f", CITY, strict=True), *TOOLS[1:2]]
    written = call_or_json(strict, PLACES[:2], content, "content")
    texts = ['{"name": "Bob"}', '{"name":"f"}', '{\n  "name": "f"\n}']
    spaced = '{\n "name":"f" ,\n"parameters": {"city":"Bern"}\n}'
    assert [text for text in [*GOOD[:3], *texts, spaced] if not accepts(compiler, small, written, text)] == []
    assert [text for text in [*BAD[:2], BAD[3], "Hi", "{}", f"{GOOD[0]}; {GOOD[0]}"]
            if accepts(compiler, small, written, text)] == []
    assert told(read(list(spaced))[0]) == ("", [("f", '{"city":"Bern"}')])
    assert [told(read(list(text))[0]) for text in texts] == [(text, []) for text in texts]


def test_schemas_keep_their_own_places_where_they_stand_in_another(small, compiler):
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "leaf": {"$ref": "#/$defs/leaf"}},
            "additionalProperties": False, "$defs": {"leaf": {"enum": [1, 2]}}}
    content = {"$ref": "#/$defs/leaf", "$defs": {"leaf": {"type": "array", "items": {"$ref": "#/$defs/leaf"}}}}
    written = call_or_json([tool("f", tree, strict=True)], PLACES[:1], content, "content")
    for text, fits in (("[[], [[]]]", True), ("[1]", False), (call("f", '{"left": {"leaf": 1}}'), True),
                       (call("f", '{"left": {"leaf": 3}}'), False), (call("f", '{"left": []}'), False)):
        assert accepts(compiler, small, written, text) == fits


def test_the_built_in_tools_take_what_they_take(small, compiler):
    written = calls([{"type": "function", "function": {"name": "brave_search"}}], ["tools[0]"])
    assert accepts(compiler, small, written, call("brave_search", '{"query": "gold"}'))
    assert not accepts(compiler, small, written, call("brave_search", "{}"))


def test_what_the_grammar_makes_is_read_as_calls(small, compiler):
    """Random tokens of those that are allowed, to the end."""
    written, rng = calls(TOOLS, PLACES), random.Random(3)
    for _ in range(30):
        ids = walk(compiler, small, written, rng, most=400)
        text, found = told(read([small.decode([token_id]) for token_id in ids], ["f", "fg", "none"])[0])
        if ids[-1] == small.token_id(EOS):
            assert text == "" and found and all(isinstance(json.loads(arguments), dict) for _, arguments in found)


@pytest.mark.parametrize(("parameters", "where"), [
    ({"type": "array"}, r"tools[0].function.parameters.type"),
    ({"type": "object", "properties": {"a": {"not": {}}}}, "tools[0].function.parameters.properties.a.not"),
    ({"properties": {"a": {"type": "x"}}}, "tools[0].function.parameters.properties.a.type"),
    (False, "tools[0].function.parameters")])
def test_a_refusal_names_the_tool(parameters, where):
    with pytest.raises(GrammarError) as caught:
        calls([tool("f", parameters)], ["tools[0]"])
    assert caught.value.where == where
