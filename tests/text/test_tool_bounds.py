"""What a reply may cost to look for calls in: depth, number, work, and a megabyte of anything."""

import re
import time

import pytest

from llama.text.cursor import MAX_DEPTH, MAX_WORK
from llama.text.tools import MAX_BEGINNINGS, PYTHON_TAG, ToolCall, ToolCallStream
from tests.text.replies import TAG, whole

F = ToolCall("f", '{"a":1}')
CALL = '{"name":"f","parameters":{"a":1}}'
CODE = ("f", "code_interpreter")


def test_depth_is_bounded(small):
    for outer, form in ((1, '{{"name":"f","parameters":{{"a":{}}}}}'), (2, "[f(a={})]")):
        fits, does_not = ("[" * depth + "]" * depth for depth in (MAX_DEPTH - outer, MAX_DEPTH - outer + 1))
        assert [each.name for each in whole(small, form.format(fits))] == ["f"]
        assert whole(small, form.format(does_not)) == [form.format(does_not)]


def test_a_reply_has_so_many_calls_and_no_more(small):
    assert whole(small, CALL * (MAX_BEGINNINGS + 1)) == [F] * MAX_BEGINNINGS + [CALL]
    false = "{x\n" * (MAX_BEGINNINGS - 1)
    assert whole(small, false + CALL) == [false, F]
    assert whole(small, f"{false}{{x\n{CALL}") == [f"{false}{{x\n{CALL}"]


def test_work_is_bounded(small):
    def arrays(count: int) -> str:
        return f'{{"name":"f","parameters":{{"a":[{",".join(["[]"] * count)}]}}}}'

    most = MAX_WORK // 2 - 2
    assert len(whole(small, arrays(most))) == 1 and isinstance(whole(small, arrays(most))[0], ToolCall)
    assert whole(small, arrays(most + 1)) == [arrays(most + 1)]
    assert [type(each) for each in whole(small, f"[f(a=[{'1,' * (MAX_WORK - 10)}])]")] == [ToolCall]
    assert [type(each) for each in whole(small, f"[f(a=[{'1,' * MAX_WORK}])]")] == [str]


MEGABYTE = 2**20
ADVERSARIES = {
    "braces": "{", "lines of braces": "\n{", "empty lines": "\n", "indented lines": "\n   ", "spaces": " ",
    "keys": '{"name":', "lines of keys": '\n{"name":', "deep": ('{"name":"f","parameters":{"a":', "["),
    "brackets": ('{"name":"f","parameters":{"a":[', "[],"),
    "strings": ('{"name":"f","parameters":{"a":["', '","'),
    "backslashes": ('{"name":"f","parameters":{"a":"', "\\"),
    "quotes": ('{"name":"f","parameters":{"a":', '"'),
    "a string": ('{"name":"f","parameters":{"a":"', "x"),
    "numbers": ('{"name":"f","parameters":{"a":[', "1,"),
    "calls": CALL + ";", "semicolons": (CALL, ";"),
    "lines of calls begun": '\n{"name":"f","parameters":{"a":',
    "nested calls": '{"name":"f","parameters":{"a":\n', "functions": "\n<function=f>{", "lists": "\n[f",
    "arguments": ("[f(", "a=1,"), "Python's numbers": ("[f(a=[", "1,"),
    "Python's strings": ("[f(a=['", "','"),
    "a name": ('{"name": "', "f"), "tags": TAG, "tagged": TAG + '{"name":"f",', "code": (TAG, "x = 1\n"),
    "text": "Hello, world. ", "lines": "Hi\n",
}


class Units:
    """A vocabulary of the python tag and of texts as long as one likes."""

    special_tokens = {PYTHON_TAG: 0}

    def __init__(self, *texts: str):
        self._texts = [PYTHON_TAG, *texts]

    def token_id(self, text: str) -> int:
        return 0 if text == TAG else self._texts.index(text)

    def text(self, ids: list[int]) -> str:
        return "".join(self._texts[token_id] for token_id in ids if token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id == 0

    def token_bytes(self, token_id: int) -> bytes:
        return self._texts[token_id].encode()


@pytest.mark.parametrize("what", ADVERSARIES)
def test_a_megabyte_of_anything_is_read_in_linear_time(what):
    """Quadratic time would be minutes; the bound is generous."""
    opening, repeated = ADVERSARIES[what] if isinstance(ADVERSARIES[what], tuple) else ("", ADVERSARIES[what])
    units = [re.findall(f"{TAG}|[^{TAG}]+", unit) for unit in (opening, repeated * (64 // len(repeated) + 1))]
    vocabulary = Units(*{part for unit in units for part in unit} - {TAG})
    begin, unit = ([vocabulary.token_id(part) for part in unit] for unit in units)
    count = MEGABYTE // 64
    for pushes in ([begin + unit * count], [begin, *[unit] * count]):
        stream = ToolCallStream(vocabulary, CODE)
        began = time.process_time()
        events = [each for push in pushes for each in stream.push(vocabulary.text(push), push)]
        events += stream.finish(is_cut=False)
        assert time.process_time() - began < 5
        assert events or what == "tags"


def test_a_vocabulary_without_the_tag():
    vocabulary = Units(CALL)
    vocabulary.special_tokens = {}
    stream = ToolCallStream(vocabulary, ["f"])
    assert stream.push(CALL, [1]) + stream.finish(is_cut=False) == [F]
