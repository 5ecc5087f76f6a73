"""What a reply must be, written as a grammar: a string that `llama.text.matcher` compiles, and that a request
carries as SamplingParams.grammar.

    json_schema({"type": "object", ...})    a JSON value that satisfies a schema (see `llama.text.schema`)
    json_object()                           any JSON object
    regex("[0-9]{4}")                       a text that a regular expression matches whole (Rust's syntax)
    choice(["yes", "no"])                   one of some texts
    lark("start: ...")                      a context-free grammar, in llguidance's variant of Lark's syntax
    calls(tools, ...)                       calls of tools (`llama.text.toolgrammar`)

Every function raises GrammarError, which names the place at fault, where there is no such grammar or where it
takes more than it may. `where` is what the caller calls the thing.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llama.text.guidance import LIMITS, MAX_KEPT, GrammarError, llguidance, make_trie
from llama.text.schema import checked_schema, closed, subschemas

__all__ = ["GrammarError", "choice", "json_object", "json_schema", "lark", "regex", "rules_of_json"]

MAX_SOURCE = 131_072  # characters of a grammar
MAX_CHOICES = 4096

# Between the parts of a JSON value: a space, or one line break and an indent. Without a bound, a model that does
# not know how to go on could write spaces for ever.
WHITESPACE = r"\n[ \t]{0,40}| "
# As Python's json.dumps writes, which is how chat templates write calls.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
FLEXIBLE = {"whitespace_pattern": WHITESPACE}

# Of llguidance's grammars, what says how to sample, or needs text to be taken back.
_OPTION = re.compile(r"^\s*%llguidance|^\s*[\w-]+\[[^\]\n]*\b(?:temperature|stop)\b", re.MULTILINE)

# Without it, where only one text can follow, only one way to cut it into tokens would be allowed.
HEADER = '%llguidance {"no_forcing": true}\n'


def json_schema(schema: Mapping[str, Any] | bool, where: str = "schema") -> str:
    """A JSON value that satisfies the schema. Its objects have their properties in the schema's order, and no others
    unless the schema speaks of them (see `llama.text.schema.closed`)."""
    return HEADER + "start: " + rules_of_json(schema, where, FLEXIBLE)


def json_object() -> str:
    """Any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str, where: str = "regex") -> str:
    """A text that a regular expression matches whole."""
    pattern = _text(pattern, where).removeprefix("^")
    if re.search(r"(?<!\\)(?:\\\\)*\$\Z", pattern):
        pattern = pattern[:-1]
    # In the grammar it stands between slashes, on one line.
    written = {"/": r"\/", "\n": r"\n", "\r": r"\r"}
    pattern = re.sub(r"(\\[^/\r\n])|\\?([/\r\n])", lambda found: found[1] or written[found[2]], pattern)
    return checked(f"{HEADER}start: /{pattern}/" if pattern else f'{HEADER}start: ""', where)


def choice(texts: Sequence[str], where: str = "choice") -> str:
    """One of these texts."""
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not 0 < len(texts) <= MAX_CHOICES:
        raise GrammarError(where, f"must be a list of 1 to {MAX_CHOICES} strings")
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            raise GrammarError(f"{where}[{index}]", "must be a string that is not empty")
    return checked(HEADER + "start: " + " | ".join(map(quoted, texts)), where)


def lark(source: str, where: str = "grammar") -> str:
    """A text of the language whose rules these are, of which one is `start`; also written as GBNF, with ::=."""
    source = _text(source, where)
    if found := _OPTION.search(source):
        raise GrammarError(where, f"has {found[0].strip()}, which is not supported: a grammar only says what a text is")
    if "::=" in source:
        llguidance()
        from llguidance.gbnf_to_lark import any_to_lark
        try:
            source = any_to_lark(source)
        except Exception as error:  # a converter that is a script, and raises what it likes
            raise GrammarError(where, f"is no GBNF: {error}") from None
    return checked(HEADER + source, where)


def rules_of_json(schema: Any, where: str, style: Mapping[str, Any]) -> str:
    """The right side of a rule for JSON values that satisfy a schema. style: what stands between their parts."""
    schema = closed(checked_schema(schema, where))
    if complaint := _complaint(_rule(schema, style)):
        where, complaint = _nearest(schema, where, complaint)
        raise GrammarError(where, complaint, "unsupported_schema")
    return _rule(schema, style)


def checked(grammar: str, where: str) -> str:
    """The grammar. Raises GrammarError if it is none."""
    if len(grammar) > MAX_SOURCE:
        raise GrammarError(where, f"has more than {MAX_SOURCE} characters")
    if complaint := _complaint(grammar):
        raise GrammarError(where, complaint)
    return grammar


def quoted(text: str) -> str:
    """A text as a literal in a grammar."""
    return json.dumps(text)


def _rule(schema: Any, style: Mapping[str, Any]) -> str:
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return "%json " + json.dumps({"x-guidance": style, **schema})


def _nearest(schema: Any, where: str, complaint: str) -> tuple[str, str]:
    """The innermost schema that has a fault by itself, and what is wrong with it."""
    definitions = {name: schema[name] for name in ("$defs", "definitions") if name in schema} \
        if isinstance(schema, dict) else {}
    while True:
        for place, part in subschemas(schema, where):
            alone = {**definitions, **part} if isinstance(part, dict) else part
            if part is not False and (inner := _complaint(_rule(alone, COMPACT))):
                schema, where, complaint = part, place, inner
                break
        else:
            return where, complaint


def _complaint(grammar: str) -> str:
    """What is wrong with a grammar, or with the right side of a rule that is one; "" if nothing is."""
    return _complaint_of(llguidance(), grammar)


@functools.lru_cache(MAX_KEPT)
def _complaint_of(library: Any, grammar: str) -> str:
    source = grammar if grammar.startswith(HEADER) else f"{HEADER}start: {grammar}"
    limits = library.LLParserLimits(**LIMITS, verbose_errors=False)
    matcher = library.LLMatcher(_bytes(), source, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()
        if not matcher.is_error():
            return ""
    message, _, _ = re.sub(r"\s+", " ", matcher.get_error()).partition(" 1 | %llguidance")  # what is ours
    message = message[:300]
    return "cannot be followed: no text satisfies it" if "NoExtension" in message else f"cannot be followed: {message}"


@functools.cache
def _bytes() -> Any:
    """The smallest vocabulary: whether a grammar is one does not depend on the tokens."""
    return make_trie([*(bytes([byte]) for byte in range(256)), b"<end>"], [256], [256])


def _text(source: Any, where: str) -> str:
    if not isinstance(source, str) or not source.strip():
        raise GrammarError(where, "must be a string that is not empty")
    if len(source) > MAX_SOURCE:
        raise GrammarError(where, f"has {len(source)} characters; at most {MAX_SOURCE} are taken")
    return source
