"""Every call that Meta's own package shows, in prompt formats and in tests, read as Meta's code reads it."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
from llama_models.llama3.api import tool_utils
from llama_models.llama3.api.datatypes import BuiltinTool, ToolCall, ToolPromptFormat

from llama.text.tools import BUILTIN_TOOLS, PYTHON_TAG
from tests.text.replies import TAG, account_for, as_ids, merged, read

PACKAGE = Path(importlib.util.find_spec("llama_models").submodule_search_locations[0])
FORMATS = ("llama3_1/prompt_format.md", "llama3_2/text_prompt_format.md", "llama3_2/vision_prompt_format.md")
TESTS = PACKAGE / "llama3" / "tests" / "api" / "test_tool_utils.py"

_REPLY = re.compile(r"##### Model Response Format\n```\n(.*?)\n```", re.DOTALL)
_TURN = re.compile(r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n([^`]+?<\|eo[tm]_id\|>)")
_END = re.compile(r"<\|eo[tm]_id\|>\Z")


def shown() -> list[str]:
    """What the model says in the prompt formats: the answers, and the assistant's turns in conversations."""
    texts = [(PACKAGE / name).read_text("utf-8") for name in FORMATS]
    return list(dict.fromkeys(each for text in texts for each in _REPLY.findall(text) + _TURN.findall(text)))


def in_metas_tests() -> list[str]:
    """The texts that Meta's tests read."""
    tree = ast.parse(TESTS.read_text("utf-8"))
    return [node.value.value for node in ast.walk(tree) if isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]


def by_meta(reply: str) -> list[tuple[str, dict]]:
    """The calls in a reply without its last token, as Meta's code reads them; of a list, all."""
    body = reply.removeprefix(PYTHON_TAG)
    if tool_utils.is_valid_python_list(body):
        return tool_utils.parse_python_list_for_function_calls(body)
    if custom := tool_utils.ToolUtils.maybe_extract_custom_tool_call(body):
        return [custom]
    if builtin := tool_utils.ToolUtils.maybe_extract_builtin_tool_call(body):
        return [(builtin[0], {"query": builtin[1]})]
    return [("code_interpreter", {"code": body})] if reply != body else []


def by_us(tokenizer, reply: str, names: set[str]) -> tuple[list[tuple[str, dict]], str]:
    """The calls and the text, each token by itself; nothing lost."""
    reply = reply.replace(PYTHON_TAG, TAG)
    events = merged(sum(read(tokenizer, [[each] for each in as_ids(tokenizer, reply)], names), []))
    assert account_for(tokenizer, reply, names) == events
    calls = [(each.name, json.loads(each.arguments)) for each in events if not isinstance(each, str)]
    return calls, "".join(each for each in events if isinstance(each, str))


@pytest.mark.parametrize("reply", shown())
def test_what_the_prompt_formats_show(tokenizer, reply):
    body = _END.sub("", reply)
    expected = by_meta(body)
    calls, text = by_us(tokenizer, body, {name for name, _ in expected} | set(BUILTIN_TOOLS))
    assert calls == expected
    assert text == ("" if expected else body)


def test_the_prompt_formats_show_calls():
    """Of all five forms: the parser of the documents sees what is there."""
    names = [name for reply in shown() for name, _ in by_meta(_END.sub("", reply))]
    assert set(names) == {*BUILTIN_TOOLS, "trending_songs", "get_weather", "get_user_info"}
    assert any(reply.startswith("<function=") for reply in shown()) and len(shown()) >= 12


@pytest.mark.parametrize("reply", in_metas_tests())
def test_what_metas_tests_read(tokenizer, reply):
    expected = by_meta(reply)
    names = set(re.findall(r"\w+(?=\()", reply)) | {"getWeather"}
    calls, text = by_us(tokenizer, reply, names)
    assert calls == expected
    assert text == ("" if expected else reply)


@pytest.mark.parametrize("form", list(ToolPromptFormat))
def test_what_metas_code_writes(tokenizer, form):
    arguments = {"n": 10, "genre": "all", "exact": True, "ratio": -0.5, "tags": ["a b", "c, d"], "none": None}
    if form != ToolPromptFormat.python_list:  # there it writes objects as nobody else does
        arguments["filter"] = {"since": 2000, "quotes": "it's \"x\" \\ \n"}
    written = by_metas_code("trending_songs", arguments, form)
    assert by_us(tokenizer, written, {"trending_songs"}) == ([("trending_songs", arguments)], "")
    for tool, given in ((BuiltinTool.brave_search, {"query": "gold"}),
                        (BuiltinTool.wolfram_alpha, {"query": "pi"}),
                        (BuiltinTool.code_interpreter, {"code": "print(1)\nx = [2]"})):
        written = PYTHON_TAG + by_metas_code(tool, given, form)
        assert by_us(tokenizer, written, set(BUILTIN_TOOLS)) == ([(tool.value, given)], "")


def by_metas_code(name: str | BuiltinTool, arguments: dict, form: ToolPromptFormat) -> str:
    """A call as Meta's code writes it."""
    call = ToolCall(call_id="", tool_name=name, arguments=arguments)
    return tool_utils.ToolUtils.encode_tool_call(call, form)
