"""llama.text.messages: what callers write, what templates get, and the words of each refusal."""

import copy

import pytest

from llama.text.messages import ChatError, normalize_messages, normalize_tools, one_call_each, plain_json


def call(name="add", arguments=None, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def assistant(*calls, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(calls)}


def result(content, call_id=None):
    return {"role": "tool", "content": content, "tool_call_id": call_id}


@pytest.mark.parametrize(
    ("message", "normalized"),
    [
        ({"role": "user", "content": " Hi \n"}, {"role": "user", "content": " Hi \n"}),
        ({"role": "developer", "content": "Be brief"}, {"role": "system", "content": "Be brief"}),
        ({"role": "assistant", "content": None}, {"role": "assistant", "content": ""}),
        ({"role": "user", "content": []}, {"role": "user", "content": ""}),
        (
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "a\nb"},
        ),
        ({"role": "user", "content": "a\ud800\ud83e\udd99"}, {"role": "user", "content": "a\ufffd🦙"}),
        ({"role": "ipython", "content": {"usd": 2000}}, {"role": "ipython", "content": {"usd": 2000}}),
        (
            {"role": "assistant", "content": "a", "tool_calls": None, "refusal": None, "name": None},
            {"role": "assistant", "content": "a"},
        ),
        ({"role": "assistant", "content": "a", "tool_calls": []}, {"role": "assistant", "content": "a"}),
        (
            {"role": "user", "content": "a", "name": "Ann", "thoughts": ("x",)},
            {"role": "user", "content": "a", "name": "Ann", "thoughts": ["x"]},
        ),
    ],
)
def test_one_message(message, normalized):
    assert normalize_messages([message]) == [normalized]


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [({"a": 1}, {"a": 1}), ('{"a": [1, "\\ud83e\\udd99"]}', {"a": [1, "🦙"]}), ("", {}), (None, {})],
)
def test_arguments_become_an_object(arguments, parsed):
    (normalized,) = normalize_messages([{"role": "assistant", "tool_calls": [call("f", arguments, id="1")]}])
    assert normalized["content"] == ""
    assert normalized["tool_calls"] == [call("f", parsed, id="1")]


def test_the_callers_objects_stay_as_they_are_and_are_not_shared():
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        assistant(call(arguments='{"a": 1}'), call(arguments={"b": {"c": [1]}})),
        {"role": "tool", "content": {"x": [1]}, "tool_call_id": None},
    ]
    before = copy.deepcopy(messages)
    normalized = normalize_messages(messages)
    one_call_each(normalized)
    normalized[1]["tool_calls"][1]["function"]["arguments"]["b"]["c"].append(2)
    normalized[2]["content"]["x"].append(2)
    assert messages == before


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = [value]
    return value


FUNCTION = "messages[0].tool_calls[0].function"


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "messages must be a list that is not empty"),
        ("hello", "messages must be a list that is not empty"),
        ({"role": "user", "content": "a"}, "messages must be a list that is not empty"),
        (["hello"], "messages[0] must be an object with role and content"),
        ([{"content": "a"}], "messages[0].role is null; it must be one of system, developer, user"),
        ([{"role": "bot", "content": "a"}], "messages[0].role is 'bot'; it must be one of system, developer"),
        ([{"role": ["user"], "content": "a"}], "messages[0].role is of type list; it must be one of"),
        ([{"role": "user", "content": "a"}] * 3 + [{"role": "user"}], "messages[3].content is missing"),
        ([{"role": "assistant", "tool_calls": []}], "messages[0].content is missing"),
        ([{"role": "user", "content": 3}], "messages[0].content is of type int; it must be a string"),
        ([{"role": "user", "content": {"a": 1}}], "messages[0].content is of type dict; it must be a string"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0] must be an object with type and text"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            "messages[0].content[1].type is 'image_url'; only 'text' is understood",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text must be a string"),
        ([{"role": "user", "content": "a", "name": 3}], "messages[0].name must be a string"),
        ([{"role": "tool", "content": "a", "tool_call_id": 3}], "messages[0].tool_call_id must be a string"),
        ([{"role": "tool", "content": {"a": {1}}}], "messages[0].content.a is of type set, which JSON"),
        ([{"role": "user", "content": "a", "extra": b"x"}], "messages[0].extra is of type bytes, which JSON"),
        ([assistant(content="a") | {"tool_calls": "x"}], "messages[0].tool_calls must be a list of objects"),
        (
            [{"role": "user", "content": "a", "tool_calls": [call()]}],
            "messages[0].tool_calls may only stand in a message of the assistant",
        ),
        ([assistant("x")], "messages[0].tool_calls[0] must be an object with function"),
        ([assistant(call(type="custom"))], "messages[0].tool_calls[0].type is 'custom'; it must"),
        ([assistant({"name": "f"})], f"{FUNCTION} must be an object with name and arguments"),
        ([assistant({"function": {"arguments": {}}})], f"{FUNCTION}.name must be a string"),
        ([assistant(call(arguments='{"a": '))], f"{FUNCTION}.arguments is not JSON: "),
        ([assistant(call(arguments="[" * 100_000))], f"{FUNCTION}.arguments is not JSON: "),
        ([assistant(call(arguments="[1]"))], f"{FUNCTION}.arguments must be a JSON object"),
        ([assistant(call(arguments=[1]))], f"{FUNCTION}.arguments must be a JSON object"),
        ([assistant(call(arguments='{"a": NaN}'))], f"{FUNCTION}.arguments.a is of type float, which"),
        ([assistant(call(arguments={3: 4}))], f"{FUNCTION}.arguments has the key 3, which is not a string"),
        ([{"role": "tool", "content": {"a": nested(100)}}], "is nested deeper than 64"),
    ],
)
def test_each_refusal_names_its_field(messages, error):
    with pytest.raises(ChatError) as caught:
        normalize_messages(messages)
    assert error in str(caught.value)


def test_tools_are_copied_and_none_of_them_is_none():
    tool = {"type": "function", "function": {"name": "f\ud800", "parameters": {"enum": (1, 2.5, None, True)}}}
    function = {"name": "f\ufffd", "parameters": {"enum": [1, 2.5, None, True]}}
    assert normalize_tools((tool,)) == [{"type": "function", "function": function}]
    assert normalize_tools([{"type": "function", "function": {**function, "strict": True}}]) == normalize_tools([tool])
    assert normalize_tools([]) is None
    assert normalize_tools(None) is None
    for tools, error in (("add", "tools must be a list"), (["add"], r"tools\[0\] must be an object")):
        with pytest.raises(ChatError, match=error):
            normalize_tools(tools)


def test_nesting_is_bounded():
    assert plain_json(nested(64), "x") == nested(64)
    with pytest.raises(ChatError, match="is nested deeper than 64"):
        plain_json(nested(65), "x")


class TestOneCallEach:
    def separated(self, *messages):
        out = []
        for message in one_call_each(normalize_messages(messages)):
            for each in message.get("tool_calls", ()):
                out.append((message["content"], each["function"]["name"]))
            if "tool_calls" not in message:
                out.append(message["content"])
        return out

    def test_single_calls_stay(self):
        messages = normalize_messages([{"role": "user", "content": "a"}, assistant(call()), result("1")])
        assert one_call_each(messages) == messages

    def test_results_follow_the_call_whose_id_they_name(self):
        calls = assistant(call("f", id="1"), call("g", id="2"), call("h", id="3"), content="c")
        user = {"role": "user", "content": "thanks"}
        answers = [result("of g", "2"), result("of nothing", "9"), result("of f", "1"), result("without id")]
        assert self.separated(calls, *answers, user, result("later", "3")) == [
            ("c", "f"), "of f", ("", "g"), "of g", ("", "h"), "of nothing", "without id", "thanks", "later",
        ]  # fmt: skip

    def test_without_ids_results_follow_the_call_in_their_place(self):
        calls = assistant(call("f"), call("g"))
        answers = [result("1"), result("2"), result("3")]
        assert self.separated(calls, *answers) == [("", "f"), "1", ("", "g"), "2", "3"]
        assert self.separated(calls, result("1")) == [("", "f"), "1", ("", "g")]
        assert self.separated(calls) == [("", "f"), ("", "g")]
