"""Grammars against other readers of the same languages: the regex package token by token, Python's json."""

import json
import random
import re

import numpy as np
import pytest
import regex

from llama.text import grammar
from llama.text.grammar import GrammarError
from llama.text.guidance import INSTALL
from llama.text.matcher import GrammarCompiler
from llama.text.schema import FORMATS, MAX_SCHEMAS, MAX_SIZE
from tests.text.walks import accepts, allowed_ids, walk

EOS = "<|eot_id|>"


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    """Of Meta's vocabulary."""
    return GrammarCompiler(tokenizer, (tokenizer.token_id(EOS), tokenizer.token_id("<|eom_id|>")))


@pytest.fixture(scope="module")
def small_compiler(small) -> GrammarCompiler:
    return GrammarCompiler(small, (small.token_id(EOS),))


# ---- masks, token by token -----------------------------------------------------------------------------

PATTERNS = [r"[a-z]{2,5}-[0-9]+(\.[0-9]{1,2})?", r"(yes|no|maybe( not)?)!*", r"Zürich|Z[uü]ri 🦙+", r"\{\"a\": (true|false)\}",
            r"a/b\\c\n+d"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_exactly_the_tokens_that_go_on_with_the_language_are_allowed(tokenizer, compiler, pattern):
    """All 128,256 of them, after each token of a text: whether bytes can go on is the regex package's to say."""
    as_bytes = regex.compile(pattern.encode() if pattern.isascii() else _bytewise(pattern))
    matcher, rng, text = compiler(grammar.regex(pattern)), random.Random(pattern), b""
    ends = {tokenizer.token_id(EOS), tokenizer.token_id("<|eom_id|>")}
    for _ in range(4):
        expected = {token_id for token_id in range(tokenizer.vocab_size) if not tokenizer.is_special(token_id)
                    and as_bytes.fullmatch(text + tokenizer.token_bytes(token_id), partial=True)}
        found = set(allowed_ids(matcher))
        assert found - ends == expected
        assert found & ends == (ends if as_bytes.fullmatch(text) else set())
        if not expected:
            break
        token_id = rng.choice(sorted(expected))
        matcher.accept(token_id)
        text += tokenizer.token_bytes(token_id)


def _bytewise(pattern: str) -> bytes:
    """A pattern over bytes: a character of several is a group."""
    return re.sub(r"\[uü\]", "(u|ü)", pattern).encode().replace("🦙".encode(), b"(" + "🦙".encode() + b")")


def test_what_is_forced_may_be_cut_into_tokens_in_any_way(tokenizer, compiler):
    """A mask says what the text may be, not how a tokenizer would have written it."""
    for ids in ([*tokenizer.encode("Hello")], [tokenizer.encode(letter)[0] for letter in "Hello"]):
        matcher = compiler(grammar.choice(["Hello"]))
        for token_id in ids:
            assert token_id in allowed_ids(matcher)
            matcher.accept(token_id)
        assert allowed_ids(matcher) == sorted(matcher._eos_token_ids)


def test_control_tokens_are_never_text(small, small_compiler):
    """Also where their names would be text, and where any text will do."""
    for written in (grammar.regex(r"(.|\n)*"), grammar.choice([EOS]), grammar.lark('start: "<|eot_id|>"')):
        matcher = small_compiler(written)
        special = {token_id for token_id in allowed_ids(matcher) if small.is_special(token_id)}
        assert special == ({small.token_id(EOS)} if "(.|" in written else set())
        assert accepts(small_compiler, small, written, EOS)


def test_masks_leave_the_matcher_as_it_is_and_forks_go_their_own_way(tokenizer, compiler):
    written = grammar.json_schema({"type": "array", "items": {"enum": ["ab", "ac", 12, 13]}})
    rng = random.Random(0)
    for _ in range(20):
        ids = walk(compiler, tokenizer, written, rng, most=12)
        cut = rng.randrange(len(ids))
        matcher, fresh = compiler(written), compiler(written)
        for token_id in ids[:cut]:
            matcher.accept(token_id)
            fresh.accept(token_id)
        guesses = [each for each in ids[cut:] if each not in matcher._eos_token_ids]
        assert matcher.num_allowed(ids[cut:]) == len(guesses)
        rows = matcher.masks(guesses)
        fork = matcher.fork()
        for row, token_id in zip(rows, guesses):
            assert np.array_equal(row, fresh.masks()[0])
            fresh.accept(token_id)
        assert np.array_equal(rows[-1], fresh.masks()[0])
        assert np.array_equal(matcher.masks(guesses), rows) and np.array_equal(fork.masks(guesses), rows)


def test_guesses_end_where_one_is_forbidden_or_ends_the_text(small, small_compiler):
    matcher, end = small_compiler(grammar.regex("a+")), small.token_id(EOS)
    [a], [b] = small.encode("a"), small.encode("b")
    assert [matcher.num_allowed(ids) for ids in ([a, a], [a, b, a], [b], [a, end, a], [])] == [2, 1, 0, 1, 0]
    assert len(matcher.masks()) == 1
    for token_id in (a, end):
        assert not matcher.is_over
        matcher.accept(token_id)
    assert matcher.is_over


# ---- languages -----------------------------------------------------------------------------------------

JSON = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "string"}}},
        "required": ["a"]}
CASES = [
    (lambda: grammar.choice(["yes", "no/", 'q"\\', "é 🦙"]), ["yes", "no/", 'q"\\', "é 🦙"], ["ye", "yesno", "", "no"]),
    (lambda: grammar.regex("[0-9]{2,3}"), ["12", "123"], ["1", "1234", "12\n", "ab"]),
    (lambda: grammar.regex(r"^a/b\$\/?\\$"), ["a/b$\\", "a/b$/\\"], ["a/b", "^a/b$"]),
    (lambda: grammar.regex("a\nb\\\n"), ["a\nb\n"], ["anb", "a\nbn"]),
    (lambda: grammar.regex("^$"), [""], ["a"]),
    (lambda: grammar.lark('start: greeting " " NAME\ngreeting: "Hi" | "Hello"\nNAME: /[A-Z][a-z]+/'),
     ["Hi Ada", "Hello Bo"], ["Hi ada", "Hi"]),
    (lambda: grammar.lark('root ::= "a" root "b" | "ab"'), ["ab", "aabb"], ["aab", "ba"]),
    (lambda: grammar.json_object(), ["{}", '{"a": [1, {"b": null}]}', '{\n  "a": "é\\n\\""\n}'],
     ["[]", "1", '{"a": 1', "{a: 1}", "{}x", " {}"]),
    (lambda: grammar.json_schema(True), ["1", '"x"', "null", "[]", "{}"], ["x", ""]),
    (lambda: grammar.json_schema(JSON), ['{"a": 1}', '{"a":-5,"b":["x", ""]}'],
     ['{"a": 1, "c": null}', '{"a": 1.5}', '{"b": []}', '{"a": 1, "b": [1]}', "{}"]),
    (lambda: grammar.json_schema(JSON), [json.dumps({"a": 1, "b": ["x"]}, indent=indent) for indent in (None, 1, 2, 8)],
     ['{  "a": 1}', '{"a": 1\n\n}', '{"a":\t1}', '{"a": 1}\n', f'{{\n{" " * 41}"a": 1}}']),
]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_what_is_of_a_language_and_what_is_not(small, small_compiler, tokenizer, compiler, number):
    write, inside, outside = CASES[number]
    for made, text_of in ((small_compiler, small), (compiler, tokenizer)):
        assert [text for text in inside if not accepts(made, text_of, write(), text)] == []
        assert [text for text in outside if accepts(made, text_of, write(), text)] == []


WRITTEN = {"date-time": ("2024-02-29T12:30:00Z", "2024-02-29 12:30"), "time": ("12:30:00Z", "25:00:00Z"),
           "date": ("2024-02-29", "2024-13-01"), "duration": ("P3DT4H", "3 days"), "email": ("ada@example.org", "ada"),
           "hostname": ("example.org", "-a-"), "ipv4": ("127.0.0.1", "256.0.0.1"), "ipv6": ("::1", "12345::"),
           "uuid": ("123e4567-e89b-12d3-a456-426614174000", "123e4567"), "uri": ("urn:x:y", "no uri")}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_held_to(small, small_compiler, name):
    written = grammar.json_schema({"type": "string", "format": name})
    good, bad = (json.dumps(text) for text in WRITTEN[name])
    assert accepts(small_compiler, small, written, good) and not accepts(small_compiler, small, written, bad)


# ---- refusals ------------------------------------------------------------------------------------------

DEEP = {"type": "string"}
for _ in range(70):
    DEEP = {"type": "array", "items": DEEP}
REFUSED = [
    (lambda: grammar.regex("("), "regex", "regex cannot be followed: .*unclosed group"),
    (lambda: grammar.regex("(?=a)b"), "regex", "look-around"),
    (lambda: grammar.regex(r"(a)\1"), "regex", "backreferences"),
    (lambda: grammar.regex(""), "regex", "must be a string that is not empty"),
    (lambda: grammar.regex("a" * 200_000), "regex", "at most 131072 are taken"),
    (lambda: grammar.choice([]), "choice", "must be a list of 1 to 4096 strings"),
    (lambda: grammar.choice(["a", ""]), r"choice\[1\]", "must be a string that is not empty"),
    (lambda: grammar.choice("ab"), "choice", "must be a list"),
    (lambda: grammar.lark("start: b"), "grammar", 'unknown name: "b"'),
    (lambda: grammar.lark("begin: /a/"), "grammar", "no start rule"),
    (lambda: grammar.lark('start: "a" <|eot_id|>'), "grammar", "unknown special token"),
    (lambda: grammar.lark('%llguidance {"no_forcing": false}\nstart: "a"'), "grammar", "has %llguidance, which is not"),
    (lambda: grammar.lark("start[temperature=0.5]: /a+/"), "grammar", r"has start\[temperature, which is not supported"),
    (lambda: grammar.lark('start: a "x"\na[stop="x"]: /[a-z]+/'), "grammar", r"has a\[stop, which is not supported"),
    (lambda: grammar.lark("root ::= ("), "grammar", "is no GBNF"),
    (lambda: grammar.json_schema([]), "schema", "must be a JSON schema"),
    (lambda: grammar.json_schema({"enum": [{1}]}), "schema", "is not JSON"),
    (lambda: grammar.json_schema({"enum": ["x" * MAX_SIZE]}), "schema", "as JSON; at most 65536 are taken"),
    (lambda: grammar.json_schema({"anyOf": [{}] * MAX_SCHEMAS}), rf"schema\.anyOf\[{MAX_SCHEMAS - 1}\]", "one schema too many"),
    (lambda: grammar.json_schema(DEEP), r"schema(\.items){65}", "is nested deeper than 64"),
    (lambda: grammar.json_schema({"properties": {"a": {"items": {"type": "strin"}}}}), r"schema\.properties\.a\.items\.type",
     "must be one of null, boolean"),
    (lambda: grammar.json_schema({"properties": {"a b": {"type": []}}}), r'schema\.properties\["a b"\]\.type', "must be one of"),
    (lambda: grammar.json_schema({"oneOf": [{"type": "null"}, {"items": [{}]}]}), r"schema\.oneOf\[1\]\.items",
     "must be a schema"),
    (lambda: grammar.json_schema({"type": "array", "uniqueItems": True}), r"schema\.uniqueItems", "must be|is not supported"),
    (lambda: grammar.json_schema({"properties": {"x": {"not": {}}}}), r"schema\.properties\.x\.not", "is not supported: it "
     "cannot be guaranteed, so leave it out"),
    (lambda: grammar.json_schema({"x-guidance": {"lenient": True}}), r"schema\.x-guidance", "is not supported"),
    (lambda: grammar.json_schema({"type": "string", "format": "color"}), r"schema\.format", "must be one of date-time"),
    (lambda: grammar.json_schema({"$ref": "other.json"}), r"schema\.\$ref", "must be a place in the same schema"),
    (lambda: grammar.json_schema({"$ref": "#/$defs/a"}), "schema", "cannot be followed"),
    (lambda: grammar.json_schema({"$ref": "#"}), "schema", "no text satisfies it"),
    (lambda: grammar.json_schema({"minimum": 3, "type": "integer", "maximum": "5"}), r"schema\.maximum", "must be a number"),
    (lambda: grammar.json_schema({"type": "integer", "exclusiveMinimum": True}), r"schema\.exclusiveMinimum", "must be a number"),
    (lambda: grammar.json_schema({"minLength": -1}), r"schema\.minLength", "must be a whole number from 0"),
    (lambda: grammar.json_schema({"required": "a"}), r"schema\.required", "must be a list of names"),
    (lambda: grammar.json_schema({"minProperties": 1}), r"schema\.minProperties", "is only supported where additionalProperties"),
    (lambda: grammar.json_schema({"anyOf": []}), r"schema\.anyOf", "must be a list of schemas that is not empty"),
    (lambda: grammar.json_schema({"properties": []}), r"schema\.properties", "must be an object of schemas"),
    (lambda: grammar.json_schema({"properties": {"a": {"type": "string", "pattern": "("}}, "type": "object"}),
     r"schema\.properties\.a", "unclosed group"),
    (lambda: grammar.json_schema({"properties": {"a": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}}),
     r"schema\.properties\.a", "oneOf constraints are not supported"),
    (lambda: grammar.json_schema({"properties": {"a": {"type": "integer", "minimum": 5, "maximum": 3}}, "required": ["a"],
                                  "type": "object"}), r"schema\.properties\.a", "greater than maximum"),
    (lambda: grammar.json_schema(False), "schema", "cannot be followed"),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_a_refusal_names_the_place(number):
    write, where, message = REFUSED[number]
    with pytest.raises(GrammarError) as caught:
        write()
    assert re.fullmatch(where, caught.value.where), caught.value.where
    assert str(caught.value).startswith(caught.value.where) and re.search(message, str(caught.value))
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


HEAVY = {
    "many properties": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1000)}},
    "products": {"allOf": [{"anyOf": [{"properties": {f"{side}{i}": {"type": "string"}}} for side in "ab"]}
                           for i in range(11)]},
    "doubling": {"$ref": "#/$defs/d0", "$defs": {"d40": {"type": "object"}} | {
        f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}},
    "multiples": {"type": "integer", "multipleOf": 999983, "minimum": 1, "maximum": 10**15},
    "repetition": {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
    "a long string": {"type": "string", "minLength": 2**31 - 1}, "a long array": {"type": "array", "minItems": 2**31 - 1},
    "choices": {"enum": [f"value {i}" for i in range(4000)]},
    "looking back": {"type": "string", "pattern": "a[ab]{400}$"},
}


@pytest.mark.parametrize("what", HEAVY)
def test_a_heavy_schema_is_followed_or_refused_but_holds_nobody_up(small, small_compiler, what):
    """How long each may take is llguidance's own measure (guidance.LIMITS): the suite would stand still otherwise."""
    try:
        written = grammar.json_schema(HEAVY[what])
    except GrammarError as error:
        assert error.where.startswith("schema")
        return
    try:
        walk(small_compiler, small, written, random.Random(0), most=20)
    except GrammarError as error:
        assert error.where == "grammar"


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(GrammarError, match=re.escape(INSTALL)) as caught:
        grammar.json_object()
    assert caught.value.code == "extra_not_installed"


def test_a_checkpoint_without_an_end_of_turn_takes_no_grammar(small):
    with pytest.raises(GrammarError, match="the checkpoint names none"):
        GrammarCompiler(small, ())(grammar.choice(["a"]))
