"""Tool calls in replies: every form, however it comes in pieces; what is none stays text, and at once."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.text.tokenizer import Tokenizer
from llama.text.tools import PYTHON_TAG, ToolCall
from tests.text.replies import TAG, account_for, as_bytes, as_ids, merged, random_call, read, whole
from tests.text.samples import small_tokenizer

FORMS = ("json", "function", "list", "dotted")
F = ToolCall("f", '{"a":1}')
CALL = '{"name":"f","parameters":{"a":1}}'
CODE = ("f", "code_interpreter")


# ---- calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_generated_calls_come_whole_and_in_pieces(small, form):
    for seed in range(60):
        written = random_call(random.Random(f"{form} {seed}"), form)
        ids = as_bytes(small, written.text)
        expected = merged(sum(read(small, [ids]), []))
        assert written.is_in(expected), written.text
        assert merged(sum(read(small, [[each] for each in ids]), [])) == expected
        for cut in range(len(ids)):
            assert merged(sum(read(small, [ids[:cut], ids[cut:]]), [])) == expected


@pytest.mark.parametrize("form", FORMS)
def test_generated_calls_in_the_tokens_of_llama(tokenizer, small, form):
    for seed in range(40):
        written = random_call(random.Random(f"{form} {seed}"), form)
        ids = as_ids(tokenizer, written.text)
        expected = whole(small, written.text)
        assert merged(sum(read(tokenizer, [[each] for each in ids]), [])) == expected
        for cut in range(len(ids)):
            assert merged(sum(read(tokenizer, [ids[:cut], ids[cut:]]), [])) == expected


@pytest.mark.parametrize(("reply", "calls"), [
    (CALL, [F]),
    ('{"type": "function", "name": "f", "parameters": {"a":1}}', [F]),
    ('{"parameters": {"a":1}, "type": "function", "name": "f"}', [F]),
    ('{"function": "f", "arguments": {"a":1}}', [F]),
    ('{"type": "function", "function": {"name": "f", "arguments": {"a":1}}}', [F]),
    (f"{TAG}{CALL}", [F]), (f"{TAG}\n{CALL}", [F]),
    (f"{CALL};{CALL}", [F, F]), (f"{CALL}; \n{CALL} {CALL}\n;{TAG}{CALL}", [F] * 4), (f" \n{CALL}; \n", [F]),
    ('<function=f>{"a":1}</function>', [F]), ('<function=f> {"a":1} </function>\n', [F]),
    ('<function=f>{"a":1}', [F]), ('<function=f>{"a":1}\n', [F]),
    ("[f(a=1)]", [ToolCall("f", '{"a": 1}')]),
    ("[ f(), f(a=1,), ]", [ToolCall("f", "{}"), ToolCall("f", '{"a": 1}')]),
    (f"{TAG}[f()]", [ToolCall("f", "{}")]),
    (f'{TAG}brave_search.call(query="a, b")', [ToolCall("brave_search", '{"query": "a, b"}')]),
    (f'{TAG}{{"name": "brave_search", "parameters": {{}}}}', [ToolCall("brave_search", "{}")]),
    # What the model wrote is what is called with: numbers, order, spaces, escapes.
    ('{"name":"f","parameters":{ "z":1.10, "a":1e5,\n"b":"\\u00e9\\ud83e"}}',
     [ToolCall("f", '{ "z":1.10, "a":1e5,\n"b":"\\u00e9\\ud83e"}')]),
])  # fmt: skip
def test_calls(small, reply, calls):
    assert whole(small, reply) == calls
    assert account_for(small, reply) == calls


@pytest.mark.parametrize(("reply", "events"), [
    (f"I look.\n{CALL}", ["I look.\n", F]), (f"I look.\n\n  {CALL}\n", ["I look.\n\n  ", F]),
    (f"I look. {TAG}{CALL}", ["I look. ", F]), (f"{CALL}\nDone.", [F, "\nDone."]),
    (f"{CALL}; Done.\n{CALL}", [F, "; Done.\n", F]), (f"{CALL};;{CALL}", [F, f";;{CALL}"]),
    (f"[\n{CALL},\n{CALL}\n]", ["[\n", F, ",\n", F, "\n]"]), (f"{{\n{CALL}", ["{\n", F]),
    (f"x\n{{{CALL}\n{CALL}", [f"x\n{{{CALL}\n", F]), (f"{TAG}x = 1\n{CALL}", ["x = 1\n", F]),
    ('I look.\n<function=f>{"a":1}</function> Done.', ["I look.\n", F, " Done."]),
    ("I look.\n[f()]\n", ["I look.\n", ToolCall("f", "{}")]),
    (f'{{"name":"f","parameters":{TAG}{CALL}', ['{"name":"f","parameters":', F]),
    (f'{{"name":"f","parameters":{{"a":{TAG}{CALL}', ['{"name":"f","parameters":{"a":', F]),
    (f'{{"name":"f","parameters":{{"a":"\\{TAG}{CALL}', ['{"name":"f","parameters":{"a":"\\', F]),
    (f'{{"name":"f","parameters":{{"a":"{TAG}{CALL}', ['{"name":"f","parameters":{"a":"', F]),
])  # fmt: skip
def test_calls_among_text(small, reply, events):
    assert whole(small, reply) == events
    assert account_for(small, reply) == events


def test_code_after_the_tag_is_a_call_where_there_is_an_interpreter(small):
    code = 'x = [f(a) for a in y]\n{"k": 1}\nprint("é")\n'
    call = ToolCall("code_interpreter", json.dumps({"code": code}, ensure_ascii=False))
    assert whole(small, TAG + code, CODE) == account_for(small, TAG + code, CODE) == [call]
    assert whole(small, f"Look:{TAG}{code}", CODE) == ["Look:", call]
    assert whole(small, TAG + code, ["f"]) == [code]
    assert whole(small, code, CODE) == [code]
    assert whole(small, f"{TAG}x{TAG}y", CODE) == [ToolCall("code_interpreter", '{"code": "xy"}')]
    assert whole(small, f"{TAG}{CALL}", CODE) == [F]
    assert json.loads(whole(small, TAG + CALL[:-1], CODE)[0].arguments) == {"code": CALL[:-1]}
    assert whole(small, TAG + code, CODE, is_cut=True) == [code]
    assert whole(small, f"{TAG} \n", CODE) == [" \n"]
    assert whole(small, TAG, CODE) == []


# ---- what is none -------------------------------------------------------------------------------------

NO_CALLS = [
    # reply, and how much of it is ever held back
    ('{"answer": 1}', '{"a'), ('{"argument": 1}', '{"argument'), ("{}", "{"), ("{ }", "{ "), ('{"', '{"'),
    ('{"type": "object"}', '{"type": "'), ('{"type": 1}', '{"type": '),
    ('{"type": "functional"}', '{"type": "function'),
    ('{"name": "Bob"}', '{"name": "'), ('{"name": "fog"}', '{"name": "f'),
    ('{"name": "get"}', '{"name": "get'), ('{"name": "f"}', '{"name": "f"'),
    ('{"name": "f", "age": 1}', '{"name": "f", "a'), ('{"name": "f", "name": "f"}', '{"name": "f", "'),
    ('{"name": "f", "function": "f"}', '{"name": "f", "'), ('{"name": "\\u0066"}', '{"name": "'),
    ('{"name": "f", "parameters": 1}', '{"name": "f", "parameters": '),
    ('{"name": "f", "parameters": null}', '{"name": "f", "parameters": '),
    ('{"name": "f", "parameters": []}', '{"name": "f", "parameters": '),
    ('{"name": "f", "parameters": "{}"}', '{"name": "f", "parameters": '),
    ('{"name": "f", "parameters": {}, "arguments": {}}', '{"name": "f", "parameters": {}, "'),
    ('{"name": "f", "parameters": {"a":1,}} ', '{"name": "f", "parameters": {"a":1,'),
    ('{"name": "f", "parameters": {"a":1,"a":1}}', '{"name": "f", "parameters": {"a":1,"a":1'),
    ('{"name": "f", "parameters": {"a":NaN}}', '{"name": "f", "parameters": {"a":NaN'),
    ('{"name": "f", "parameters": {"a":1e999}}', '{"name": "f", "parameters": {"a":1e999'),
    ('{"name": "f", "parameters": {"a":"\n"}}', '{"name": "f", "parameters": {"a":"'),
    ('{"function": {"name": "f", "parameters": {}}, "arguments": {}}',
     '{"function": {"name": "f", "parameters": {}}, "'),
    (f'{{\n"name" {CALL}', '{\n"name" '),
    ('{"name": "f", "parameters": {"a": "\\', '{"name": "f", "parameters": {"a": "\\'),
    ('{"function": {"type": "function"}}', '{"function": {"'), ('{"parameters": {}, "function": {}}',
                                                                '{"parameters": {}, "function": '),
    ('{"name": "f" "parameters": {}}', '{"name": "f" '), ("{'name': 'f'}", "{"), ('{"name"; "f"}', '{"name"'),
    ("<f", "<f"), ("<p>f</p>", "<"), ("<function=g>{}</function>", "<function=g"),
    ("<function>", "<function"),
    ("<function=f>1</function>", "<function=f>"), ("<function=f>{}</functions>", "<function=f>{}</function"),
    ("<function=f>{}{}</function>", "<function=f>{}"), ("<function=f>{1}</function>", "<function=f>{1"),
    ("[1]", "["), ("[]", "["), ("[link](f)", "["), ("[f]", "[f"), ("[g(a=1)]", "[g"), ("[f (a=1)]", "[f"),
    ("[f(1)]", "[f(1)"), ("[f(a=b)]", "[f(a=b)"), ("[f(a=1), g()]", "[f(a=1), g()"),
    ("[f(a=1) f()]", "[f(a=1) f()"),
    ("[f(a=f())]", "[f(a=f())"), ("[f(a=1, a=1)]", "[f(a=1, a=1)"), ("[f(a={1})]", "[f(a={1})"),
    ("[f(**{})]", "[f(**{})"),
    ("[f(a=1)}", "[f(a=1)"), ("[f(a=1e999)]", "[f(a=1e999)"), ("f(a=1)", ""),
    ('brave_search.call(query="x")', ""),
    (f'Say {CALL}', ""), (f"; {CALL}", ""), ("\n; x", "\n"), ("Hello", ""), ("", ""),
    (f"{TAG}brave_search.call", "brave_search.call"), (f"{TAG}brave_search.run()", "brave_search."),
    (f'{TAG}brave_search.call("x")', 'brave_search.call("x"'), (f"{TAG}g.call()", "g"),
    (f"{TAG}import os", ""),
    (f"{TAG}{TAG}", ""),
]  # fmt: skip


@pytest.mark.parametrize(("reply", "held"), NO_CALLS)
def test_what_is_no_call_is_text_as_soon_as_that_shows(small, reply, held):
    text = reply.replace(TAG, "")
    for is_cut in (False, True):
        assert whole(small, reply, is_cut=is_cut) == ([text] if text else [])
        assert account_for(small, reply, is_cut=is_cut) == ([text] if text else [])
    ids = as_bytes(small, reply)
    most = came = 0
    for position, events in enumerate(read(small, [[each] for each in ids]), start=1):
        came += sum(len(each.encode()) for each in events)
        most = max(most, len(small.decode(ids[:position]).encode()) - came)
    assert most == len(held)


def test_a_tag_that_is_spelled_is_text(small):
    spelled = '<|python_tag|>brave_search.call(query="x")'
    assert whole(small, spelled) == [spelled]
    assert whole(small, f"<|python_tag|>{CALL}") == [f"<|python_tag|>{CALL}"]


@pytest.mark.parametrize("reply", [CALL, f"{TAG}{CALL}", '<function=f>{"a":1}</function>', "[f(a=1), f()]",
                                   f'{TAG}brave_search.call(query="x")', f"Hi\n{CALL}", f"{CALL}; {CALL}"])
def test_a_call_that_is_cut_is_text_in_full(small, reply):
    """By the limit, or by a stop string, in every place but behind the call's last character."""
    before = account_for(small, reply)
    last = reply[-1]
    for length in range(len(reply)):
        events = whole(small, reply[:length], is_cut=True)
        calls = [each for each in events if not isinstance(each, str)]
        assert calls == [F] * (reply[:length].count(CALL))
        if not calls:
            assert "".join(events) == reply[:length].replace(TAG, "")
    stopped = whole(small, reply, stop=[last])
    assert stopped == whole(small, reply[:reply.index(last)], is_cut=True) != before
    assert whole(small, f"{reply}STOP", stop=["STOP"]) == before


# ---- in any order, in any place -----------------------------------------------------------------------

_FRAGMENTS = st.sampled_from([
    CALL, '{"name": "f", ', '"parameters": ', '{"a": "x"}', '"type": "function", ', '"function": ', "}", "{",
    "[", "]",
    "<function=", "f", ">", "</function>", "[f(", "a=1", "f()", "(", ")", "'", '"', "\\", "\n", ";", " ", ",",
    ":", "1", TAG,
    "brave_search", ".call(", 'query="x"', "code", "é", "🦙", "<|python_tag|>", "\x00", "\u2028", "\ufffd"])
_REPLIES = st.lists(_FRAGMENTS, max_size=12).map("".join)


@st.composite
def _spoiled_calls(draw):
    """A call in some form, with a character or two taken out, put in or put in another's place."""
    written = random_call(draw(st.randoms(use_true_random=False)), draw(st.sampled_from(FORMS))).text
    for _ in range(draw(st.integers(0, 2))):
        place = draw(st.integers(0, len(written)))
        written = written[:place] + draw(_FRAGMENTS | st.just("")) + written[place + draw(st.integers(0, 1)):]
    before, after = st.sampled_from(["", "\n", "Hi. ", "Hi.\n", CALL]), st.sampled_from(["", "\n", ";", CALL])
    return draw(before) + written + draw(after)


@settings(max_examples=300, deadline=None)
@given(_REPLIES | _spoiled_calls(), st.sampled_from([("f",), ("f", "brave_search"), CODE]), st.booleans(),
       st.data())
def test_no_character_is_lost_or_told_twice(reply, names, is_cut, data):
    small = Tokenizer(small_tokenizer())
    events = account_for(small, reply, names, is_cut=is_cut)
    assert events == whole(small, reply, names, is_cut=is_cut)
    ids = as_ids(small, reply)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=4)))
    pushes = [ids[start:end] for start, end in zip([0, *cuts], [*cuts, len(ids)])]
    assert events == merged(sum(read(small, pushes, names, is_cut=is_cut), []))
    for each in events:
        if isinstance(each, ToolCall):
            assert each.name in names and isinstance(json.loads(each.arguments), dict)


# ---- behind a stream of text --------------------------------------------------------------------------


def test_the_tag_stands_where_it_stood_though_the_text_comes_later(small):
    """A stop string that might have begun holds back the text before the tag."""
    reply = f'Hi{TAG}brave_search.call(query="x")'
    for stop in ("Hint", "i!", "ib.", "Hi there"):
        assert whole(small, reply, stop=[stop]) == ["Hi", ToolCall("brave_search", '{"query": "x"}')]
    assert whole(small, f"Hi{TAG}{CALL[1:]}", stop=["Hint"]) == [f"Hi{CALL[1:]}"]
    # A stop string reaches over the tag, as it does in text.
    assert whole(small, reply, stop=["ibr"]) == ["H"]


def test_the_tag_stands_behind_characters_that_are_not_whole(small):
    [first, *rest] = as_bytes(small, "é")
    tag = small.special_tokens[PYTHON_TAG]
    ids = [first, tag, *as_bytes(small, CALL)]
    assert merged(sum(read(small, [[each] for each in ids]), [])) == [f"\ufffd{CALL}"]
    ids = [first, tag, *rest, *as_bytes(small, CALL)]
    assert merged(sum(read(small, [[each] for each in ids]), [])) == [f"é{CALL}"]


def test_a_tag_that_is_shown_is_text_and_a_tag(small):
    for reply, events in ((f"Hi {TAG}{CALL}", ["Hi <|python_tag|>", F]), (f"{TAG}Hi", ["<|python_tag|>Hi"]),
                          (f'é{TAG}brave_search.call(query="x")',
                           ["é<|python_tag|>", ToolCall("brave_search", '{"query": "x"}')])):
        assert whole(small, reply, skip_special_tokens=False) == events
        ids = as_bytes(small, reply)
        assert merged(sum(read(small, [[each] for each in ids], skip_special_tokens=False), [])) == events
