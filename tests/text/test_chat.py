"""llama.text.chat: FACTS.md's goldens, the options, the files, and the words of each refusal."""

import hashlib
import json
from datetime import datetime

import pytest

from llama.text.chat import ChatError, ChatTemplate
from llama.text.tokenizer import TokenizerError
from tests.text.conversations import ADD, SEARCH, assistant, calling, system, tool, user

P = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
D = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
E = "<|eot_id|>"


def h(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


A = h("assistant")


ADDING = [user("Add 1 and 2"), calling(("add", {"a": 1, "b": 2})), tool("3")]
SEARCHING = [
    user("Gold price?"),
    calling(("brave_search", {"query": "gold price"})),
    {"role": "ipython", "content": {"usd": 2000}},
]
# Messages, options, the rendering where FACTS.md spells it out, the beginning of its sha256, its token count.
GOLDENS = {
    "G1": ([user(" Hi \n")], {}, P + D + E + h("user") + "Hi" + E + A, "9ca3fce93e4de58b", 36),
    "G2": (
        [system("Be brief. "), user("Hi")],
        {},
        P + D + "Be brief." + E + h("user") + "Hi" + E + A,
        "213a22594927da51",
        39,
    ),
    "G3": (
        [user("1+1?"), assistant("2 "), user("2+2?")],
        {},
        P + D + E + h("user") + "1+1?" + E + A + "2" + E + h("user") + "2+2?" + E + A,
        "43d858ede5a991e8",
        54,
    ),
    "G4": (ADDING[:1], {"tools": [ADD]}, None, "db3bcd3edc2b532d", 149),
    "G5": (ADDING, {"tools": [ADD]}, None, "5721be9221dc100d", 184),
    "G6": (SEARCHING, SEARCH, None, "de2bdace374dca37", 77),
}
G1_IDS = [
    *(128000, 128006, 9125, 128007, 271, 38766, 1303, 33025, 2696, 25, 6790, 220, 2366, 18, 198),
    *(15724, 2696, 25, 220, 1627, 10263, 220, 2366, 19, 271, 128009),
    *(128006, 882, 128007, 271, 13347, 128009, 128006, 78191, 128007, 271),
]


@pytest.mark.parametrize("golden", GOLDENS)
def test_golden(template, tokenizer, meta, golden):
    messages, options, spelled_out, sha256, count = GOLDENS[golden]
    text = template.render(messages, **options)
    ids = template.encode(tokenizer, messages, **options)
    assert spelled_out in (None, text)
    assert hashlib.sha256(text.encode()).hexdigest().startswith(sha256)
    assert len(ids) == count
    assert ids == meta.encode(text, bos=False, eos=False, allowed_special="all")


def test_ids_of_the_first_golden_with_one_bos(template, tokenizer):
    ids = template.encode(tokenizer, [user(" Hi \n")])
    assert ids == G1_IDS
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_continued_message_is_the_finished_one_without_its_end(template, tokenizer):
    options = {"add_generation_prompt": False, "continue_final_message": True}
    for content in ("2", " 2 \n", "", " \n", "a<|eot_id|>b", "<|eot_id|>"):
        messages = [user("1+1?"), assistant(content)]
        finished = template.encode(tokenizer, messages, add_generation_prompt=False)
        assert finished[-1] == 128009
        assert template.encode(tokenizer, messages, **options) == finished[:-1]
    assert template.render([user("Once")], [ADD], **options).endswith("Once")
    for do, spaces in (("", "  "), ("|trim", " ")):
        twice = ChatTemplate(f"{{{{ messages[0].content{do} }}}} {{{{ messages[0].content{do} }}}} end")
        assert twice.render([user("Once ")], **options) == f"Once{spaces}Once{spaces[1:]}"


def test_what_cannot_be_continued_is_refused(template):
    options = {"add_generation_prompt": False, "continue_final_message": True}
    for last in (calling(("f", {})), tool({"a": 1})):
        with pytest.raises(ChatError, match="needs a last message that is text"):
            template.render([user("a"), last], **options)
    with pytest.raises(ChatError, match="drops the last message's content"):
        ChatTemplate("nothing").render([user("a")], **options)
    with pytest.raises(ChatError, match="and continue_final_message exclude each other"):
        template.render([user("a")], continue_final_message=True)


def test_what_callers_write_is_normalized_before_rendering(template):
    expected = template.render(ADDING, [ADD])
    wire = [
        {"role": "user", "content": [{"type": "text", "text": "Add 1"}, {"type": "text", "text": "and 2"}]},
        {**calling(("add", '{"a": 1, "b": 2}')), "content": None},
        tool("3", tool_call_id="x"),
    ]
    assert template.render(wire, [ADD]) == expected.replace("Add 1 and 2", "Add 1\nand 2")
    assert template.render([{"role": "developer", "content": "a"}, user("b")]) == template.render(
        [system("a"), user("b")], tools=[], builtin_tools=[]
    )
    assert template.render([user("a"), {**assistant("b"), "tool_calls": None}]).endswith(A + "b" + E + A)


def test_several_tool_calls_are_rendered_each_with_its_own_result(template):
    together = [
        user("a"),
        calling(("f", {"x": 1}, "1"), ("g", '{"y": 2}', "2")),
        tool("of g", tool_call_id="2"),
        tool("of f", tool_call_id="1"),
        assistant("done"),
    ]
    apart = [
        user("a"),
        calling(("f", {"x": 1})),
        tool("of f"),
        calling(("g", {"y": 2})),
        tool("of g"),
        assistant("done"),
    ]
    assert template.render(together, [ADD]) == template.render(apart, [ADD])


def test_a_template_that_takes_several_tool_calls_gets_them_together():
    source = "{% for m in messages %}{{ m.tool_calls | length }};{% endfor %}"
    assert ChatTemplate(source).render([calling(("f", {}), ("g", {}))]) == "2;"


def test_refusals_of_the_template_carry_its_message(template):
    with pytest.raises(ChatError, match="refused the conversation: Cannot put tools in the first"):
        template.render([system("a")], [ADD])
    with pytest.raises(ChatError, match="refused the conversation: only two"):
        ChatTemplate("{{ raise_exception('only two') }}").render([calling(("f", {}), ("g", {}))])


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 // 0 }}",
        "{{ 'a' + 1 }}",
        "{{ messages[0].x.y }}",
        "{{ nothing | tojson }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% include 'x' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_is_an_error_of_the_chat(source):
    with pytest.raises(ChatError, match="the chat template failed: "):
        ChatTemplate(source).render([user("a")])


def test_bad_messages_and_options_are_refused_by_name(template):
    with pytest.raises(ChatError, match=r"messages\[1\].content is missing"):
        template.render([user("a"), {"role": "user"}])
    with pytest.raises(ChatError, match="builtin_tools must be a list of names"):
        template.render([user("a")], builtin_tools="brave_search")


def test_dates(template):
    assert "Today Date: 1 May 2030\n" in template.render([user("a")], date_string="1 May 2030")
    asking = ChatTemplate("{{ date_string if date_string is defined else strftime_now('%Y') }}")
    assert asking.render([user("a")], date_string="x") == "x"
    assert asking.render([user("a")]) in (str(datetime.now().year), str(datetime.now().year - 1))


def test_jinja_is_set_up_as_templates_expect():
    source = """
    {%- for m in messages %}
        {%- if loop.index == 2 %}{% break %}{% endif %}
        {{ m | tojson }}
    {% endfor %}
    {# no blank lines from these #}
    {{ bos_token }} {{ eos_token }}
"""
    text = ChatTemplate(source, "<b>", "<e>").render([user("é <&>"), user("b")])
    assert text == '        {"role": "user", "content": "é <&>"}\n    <b> <e>'


class TestFromDirectory:
    def write(self, directory, **config):
        (directory / "tokenizer_config.json").write_text(json.dumps(config))

    def test_none_where_there_is_none(self, tmp_path):
        assert ChatTemplate.from_directory(tmp_path) is None
        self.write(tmp_path, bos_token="<b>")
        assert ChatTemplate.from_directory(tmp_path) is None

    def test_the_jinja_file_comes_before_the_configuration(self, tmp_path):
        self.write(tmp_path, chat_template="c {{ bos_token }}", bos_token={"content": "<b>"}, eos_token="<e>")
        assert ChatTemplate.from_directory(tmp_path).render([user("a")]) == "c <b>"
        (tmp_path / "chat_template.jinja").write_text("é {{ bos_token }} {{ eos_token }}", encoding="utf-8")
        assert ChatTemplate.from_directory(tmp_path).render([user("a")]) == "é <b> <e>"

    def test_of_named_templates_the_default(self, tmp_path):
        named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
        self.write(tmp_path, chat_template=named)
        assert ChatTemplate.from_directory(tmp_path).render([user("a")]) == "d"
        for template in (named[:1], 3, ["a"]):
            self.write(tmp_path, chat_template=template)
            with pytest.raises(ChatError, match="tokenizer_config.json: chat_template must be a string"):
                ChatTemplate.from_directory(tmp_path)

    def test_files_that_cannot_be_read_are_named(self, tmp_path):
        self.write(tmp_path, chat_template="a\n{{ b")
        with pytest.raises(ChatError, match="tokenizer_config.json: .* syntax error in line 2: "):
            ChatTemplate.from_directory(tmp_path)
        (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
        with pytest.raises(ChatError, match="chat_template.jinja: .*utf-8"):
            ChatTemplate.from_directory(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text("{")
        with pytest.raises(TokenizerError, match="tokenizer_config.json is not JSON"):
            ChatTemplate.from_directory(tmp_path)
