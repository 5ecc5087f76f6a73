"""JSON schemas as constraints against the public test suite, and against jsonschema on schemas of every kind."""

import itertools
import json
import random
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.text import grammar
from llama.text.grammar import GrammarError
from llama.text.matcher import GrammarCompiler
from llama.text.schema import checked_schema, closed
from tests.oracles import json_schema_suite
from tests.text.walks import accepts, walk

EOS = "<|eot_id|>"

# The files of the suite whose keywords are supported, and how many of the schemas in them can be followed. The
# others have more to them: remote references, keywords that are refused, what no text satisfies.
SUPPORTED = {"additionalProperties": 7, "allOf": 10, "anchor": 1, "anyOf": 7, "boolean_schema": 1, "const": 15,
             "content": 4, "default": 3, "enum": 14, "exclusiveMaximum": 1, "exclusiveMinimum": 1,
             "infinite-loop-detection": 1, "items": 10, "maxItems": 2, "maxLength": 2, "maximum": 2, "minItems": 2,
             "minLength": 2, "minimum": 2, "multipleOf": 4, "oneOf": 2, "pattern": 2, "patternProperties": 2,
             "prefixItems": 4, "properties": 6, "ref": 18, "required": 5, "type": 11}


@pytest.fixture(scope="module")
def compiler(small) -> GrammarCompiler:
    return GrammarCompiler(small, (small.token_id(EOS),))


def orders(value: Any) -> list[Any]:
    """The value with the properties of its objects in every order, up to 24 of them: a grammar has one."""
    if isinstance(value, list):
        return [list(items) for items in itertools.islice(itertools.product(*map(orders, value)), 24)]
    if isinstance(value, dict):
        return [dict(items) for keys in itertools.permutations(value)
                for items in itertools.product(*([(key, each) for each in orders(value[key])] for key in keys))][:24]
    return [value]


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_public_suite(small, compiler, name):
    """A schema is refused, or says of each instance what the suite says, but for properties that are not listed."""
    num_followed, wrongly_accepted, wrongly_left_out = 0, [], []
    for case in json_schema_suite()[name]:
        try:
            written = grammar.json_schema(case["schema"])
        except GrammarError:
            continue
        num_followed += 1
        narrowed = closed(checked_schema(case["schema"], "schema"))
        for test in case["tests"]:
            is_valid = test["valid"] and jsonschema.Draft202012Validator(narrowed).is_valid(test["data"])
            is_accepted = any(accepts(compiler, small, written, json.dumps(each, ensure_ascii=False))
                              for each in orders(test["data"]))
            if is_accepted != is_valid:
                list_of = wrongly_accepted if is_accepted else wrongly_left_out
                list_of.append((case["description"], test["description"]))
    assert wrongly_accepted == [] and num_followed == SUPPORTED[name]
    # A whole number that is written as a float, as in 1.0, is not taken for an integer.
    assert all(re.search(r"float|\.0", description) for _, description in wrongly_left_out)


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(("schema", "takes_others"), [
    (OBJECT, False), ({**OBJECT, "additionalProperties": True}, True), ({"type": "object"}, True),
    ({**OBJECT, "additionalProperties": {"type": "integer"}}, True), ({**OBJECT, "required": ["b"]}, True),
    ({**OBJECT, "patternProperties": {"^b": {}}}, True), ({"anyOf": [OBJECT, {"type": "null"}]}, False),
    ({"allOf": [OBJECT, {"properties": {"b": {}}}]}, True), ({"$ref": "#/$defs/o", "$defs": {"o": OBJECT}}, False),
    ({**OBJECT, "anyOf": [{"properties": {"b": {}}}, {"properties": {"c": {}}}]}, True)])
def test_objects_have_the_properties_that_are_listed_and_no_others_unless_the_schema_speaks_of_them(
        small, compiler, schema, takes_others):
    written = grammar.json_schema(schema)
    others = [accepts(compiler, small, written, json.dumps(value)) for value in ({"a": 1, "b": 2}, {"b": 2, "a": 1})]
    assert any(others) == takes_others
    assert "required" in schema or accepts(compiler, small, written, '{"a": 1}')


@pytest.mark.parametrize("name", sorted({"contains", "dependentRequired", "dependentSchemas", "dynamicRef", "if-then-else",
                                         "not", "propertyNames", "unevaluatedItems", "unevaluatedProperties",
                                         "uniqueItems"}))
def test_what_is_not_supported_is_refused_not_ignored(name):
    for case in json_schema_suite()[name]:
        if case["schema"].get("uniqueItems") is False:  # which says nothing
            assert grammar.json_schema(case["schema"])
            continue
        with pytest.raises(GrammarError, match=r"^schema\S* (is not supported|must be)"):
            grammar.json_schema(case["schema"])


# ---- schemas of every kind -----------------------------------------------------------------------------

_names = st.sampled_from(["a", "b", "name", "x y", "é", 'q"', ""])
_scalars = st.none() | st.booleans() | st.integers(-50, 50) | st.sampled_from([0.5, -2.25, "x", "", 'q"', "é🦙", "a b"])
_values = st.recursive(_scalars, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_names, inner, max_size=2),
                       max_leaves=4)


def _bounded(low: str, high: str, most: int) -> st.SearchStrategy[dict]:
    pair = st.tuples(st.integers(0, most), st.integers(0, most)).map(sorted)
    return pair.flatmap(lambda ends: st.sampled_from([{}, {low: ends[0]}, {high: ends[1]}, {low: ends[0], high: ends[1]}]))


_strings = st.builds(lambda length, more: {"type": "string", **length, **more}, _bounded("minLength", "maxLength", 6),
                     st.sampled_from([{}, {}, {"pattern": "^[a-c]*$"}]))
_numbers = st.builds(lambda kind, bounds: {"type": kind, **bounds}, st.sampled_from(["integer", "number"]),
                     _bounded("minimum", "maximum", 30) | _bounded("exclusiveMinimum", "minimum", 30)
                     | st.sampled_from([{"multipleOf": 3}, {"exclusiveMaximum": 5, "multipleOf": 2}, {"minimum": -1.5}]))
_leaves = (st.sampled_from([{"type": "null"}, {"type": "boolean"}, {"type": ["string", "null"]}, {}, True, {"type": "object"},
                            {"type": "string", "format": "date"}, {"type": "array"}])
           | _strings | _numbers | st.builds(lambda value: {"const": value}, _values)
           | st.builds(lambda values: {"enum": values}, st.lists(_values, min_size=1, max_size=3)))


def _larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.builds(lambda items, count, prefix: {"type": "array", "items": items, **count, **prefix}, inner,
                       _bounded("minItems", "maxItems", 3),
                       st.builds(lambda items: {"prefixItems": items} if items else {}, st.lists(inner, max_size=2)))
    objects = st.builds(
        lambda properties, required, more: {"type": "object", "properties": properties, "required": required, **more},
        st.dictionaries(_names, inner, max_size=3), st.lists(_names, max_size=2, unique=True),
        st.sampled_from([{}, {"additionalProperties": False}, {"additionalProperties": {"type": "integer"}},
                         {"patternProperties": {"^x": {"type": "boolean"}}}]))
    several = st.lists(inner, min_size=1, max_size=3)
    return arrays | objects | st.builds(lambda key, options: {key: options}, st.sampled_from(["anyOf", "oneOf", "allOf"]),
                                        several)


_schemas = st.recursive(_leaves, _larger, max_leaves=6)


@settings(max_examples=250)
@given(_schemas, st.integers(0, 2**32))
def test_whatever_a_schema_lets_through_satisfies_it(small, compiler, schema, seed):
    """Random tokens of those that are allowed, to the end: jsonschema has nothing against what comes out."""
    try:
        written = grammar.json_schema(schema)
    except GrammarError:
        return
    ids = walk(compiler, small, written, random.Random(seed), most=300)
    if ids[-1] == small.token_id(EOS):
        value = json.loads(small.decode(ids))
        jsonschema.Draft202012Validator(schema).validate(value)


@settings(max_examples=150)
@given(_schemas)
def test_few_schemas_are_refused_and_every_refusal_names_a_place(schema):
    try:
        grammar.json_schema(schema)
    except GrammarError as error:
        assert error.where.startswith("schema") and str(error).startswith(error.where)
