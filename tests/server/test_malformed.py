"""A corpus of malformed bodies, made field by field: each is a 400 that names the place."""

import json

import pytest

from server.protocol import ApiError, dumps, parse_chat, parse_completion
from tests.server.samples import make_served

SERVED = make_served()
PARSE = {"chat": parse_chat, "completion": parse_completion}
BASE = {"chat": '"messages":[{"role":"user","content":"Hi"}]', "completion": '"prompt":"Hi"'}

# fmt: off
# What no field takes, as JSON or what looks like it.
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e999", "9" * 25]
WRONG = {
    "number": ["true", '"1"', "[]", "{}", "[1]", *NUMBERS],
    "integer": ["false", '"1"', "[]", "{}", "1.5", "-99999999999999999999", "1e300", *NUMBERS],
    "boolean": ["0", "1", '"true"', "[]", "{}", "NaN"],
    "string": ["0", "true", "[]", "{}", "NaN"],
    "object": ["0", "true", "[]", '"x"', "NaN"],
    "array": ["0", "true", "{}", '"x"', "NaN"],
}
SHARED = {
    "number": ["temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty",
               "repetition_penalty"],
    "integer": ["top_k", "seed", "n", "min_tokens", "prompt_logprobs", "max_tokens"],
    "boolean": ["stream", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "echo", "store"],
    "string": ["model", "user", "service_tier", "safety_identifier", "prompt_cache_key", "guided_regex",
               "guided_grammar"],
    "object": ["logit_bias", "stream_options", "metadata", "response_format"],
    "array": ["stop_token_ids", "guided_choice"],
}
OWN = {
    "chat": {"integer": ["max_completion_tokens", "top_logprobs"],
             "boolean": ["logprobs", "add_generation_prompt", "continue_final_message",
                         "parallel_tool_calls"],
             "array": ["messages", "tools"]},
    "completion": {"integer": ["logprobs"], "string": ["suffix"]},
}
# Inside of fields: the body's own part, and the place that is at fault.
MESSAGE = '"messages":[{"role":"user","content":"Hi"},%s]'
TOOL_MESSAGE = MESSAGE % '{"role":"assistant","tool_calls":[%s]}'
TOOL = '"tools":[{"type":"function","function":{"name":"f"}},%s]'
CALL = '{"function":{"name":"f","arguments":%s}}'
INSIDE = [
    (MESSAGE % "1", "messages[1]"), (MESSAGE % "null", "messages[1]"), (MESSAGE % "[]", "messages[1]"),
    (MESSAGE % "{}", "messages[1].role"), (MESSAGE % '{"role":"x","content":""}', "messages[1].role"),
    (MESSAGE % '{"role":null,"content":""}', "messages[1].role"),
    (MESSAGE % '{"content":""}', "messages[1].role"),
    (MESSAGE % '{"role":"user"}', "messages[1].content"),
    (MESSAGE % '{"role":"user","content":1}', "messages[1].content"),
    (MESSAGE % '{"role":"user","content":{}}', "messages[1].content"),
    (MESSAGE % '{"role":"user","content":[1]}', "messages[1].content[0]"),
    (MESSAGE % '{"role":"user","content":["x"]}', "messages[1].content[0]"),
    (MESSAGE % '{"role":"user","content":[{}]}', "messages[1].content[0].type"),
    (MESSAGE % '{"role":"user","content":[{"type":"text"}]}', "messages[1].content[0].text"),
    (MESSAGE % '{"role":"user","content":[{"type":"text","text":null}]}', "messages[1].content[0].text"),
    (MESSAGE % '{"role":"user","content":[{"type":"text","text":1}]}', "messages[1].content[0].text"),
    (MESSAGE % '{"role":"user","content":[{"type":"text","text":"","x":1}]}', "messages[1].content[0].x"),
    *((MESSAGE % f'{{"role":"user","content":[{{"{kind}":1,"type":"{kind}"}}]}}',
       "messages[1].content[0].type")
      for kind in ("image_url", "input_audio", "file", "refusal", "Text", "")),
    (MESSAGE % '{"role":"user","content":"","content":""}', "messages[1].content"),
    (MESSAGE % '{"role":"user","content":"","extra":1}', "messages[1].extra"),
    (MESSAGE % '{"role":"user","content":"","extra":NaN}', "messages[1].extra"),
    (MESSAGE % '{"role":"user","content":"","name":1}', "messages[1].name"),
    (MESSAGE % ('{"role":"user","content":"","name":"%s"}' % ("x" * 257)), "messages[1].name"),
    (MESSAGE % '{"role":"tool","content":"","tool_call_id":1}', "messages[1].tool_call_id"),
    (MESSAGE % '{"role":"assistant","content":"","refusal":"x"}', "messages[1].refusal"),
    (MESSAGE % '{"role":"assistant","content":"","function_call":{}}', "messages[1].function_call"),
    (MESSAGE % '{"role":"assistant","content":"","annotations":[1]}', "messages[1].annotations"),
    (MESSAGE % '{"role":"user","content":"","tool_calls":[{"function":{"name":"f"}}]}',
     "messages[1].tool_calls"),
    (TOOL_MESSAGE % "1", "messages[1].tool_calls[0]"),
    (TOOL_MESSAGE % "{}", "messages[1].tool_calls[0].function"),
    (TOOL_MESSAGE % '{"type":"x","function":{"name":"f"}}', "messages[1].tool_calls[0].type"),
    (TOOL_MESSAGE % '{"function":{}}', "messages[1].tool_calls[0].function.name"),
    (TOOL_MESSAGE % '{"function":{"name":1}}', "messages[1].tool_calls[0].function.name"),
    (TOOL_MESSAGE % '{"index":0,"function":{"name":"f"}}', "messages[1].tool_calls[0].index"),
    *((TOOL_MESSAGE % (CALL % json.dumps(arguments)), f"messages[1].tool_calls[0].function.arguments{inside}")
      for arguments, inside in (("{", ""), ("[]", ""), ("1", ""), ("null", ""), (1, ""), ([], ""), (True, ""),
                                ('{"a":NaN}', ".a"), ('{"a":1,"a":2}', ".a"), ("[" * 9999, ""),
                                ('{"a":1e999}', ".a"))),
    (TOOL % "1", "tools[1]"), (TOOL % "{}", "tools[1].type"), (TOOL % '{"type":"x"}', "tools[1].type"),
    (TOOL % '{"type":"function"}', "tools[1].function"),
    (TOOL % '{"type":"function","function":{}}', "tools[1].function.name"),
    *((TOOL % '{"type":"function","function":{"name":%s}}' % name, "tools[1].function.name")
      for name in ('""', '"a b"', "1", "null", '"é"', f'"{"x" * 65}"')),
    (TOOL % '{"type":"function","function":{"name":"f","parameters":[]}}', "tools[1].function.parameters"),
    (TOOL % '{"type":"function","function":{"name":"f","parameters":{"a":[{"b":NaN}]}}}',
     "tools[1].function.parameters.a[0].b"),
    (TOOL % '{"type":"function","function":{"name":"f","strict":1}}', "tools[1].function.strict"),
    (TOOL % '{"type":"function","function":{"name":"f","x":1}}', "tools[1].function.x"),
    (TOOL % '{"type":"function","x":1,"function":{"name":"f"}}', "tools[1].x"),
    *(('"tool_choice":' + choice, "tool_choice")
      for choice in ('"required"', '"f"', "1", "[]", "true")),
    ('"tool_choice":{}', "tool_choice.type"),
    ('"tool_choice":{"type":"function","function":{"name":"f"}}', "tool_choice"),
    ('"tools":[{"type":"function","function":{"name":"f"}}],"tool_choice":{"type":"function","function":{"name":"g"}}',
     "tool_choice.function.name"),
    *(('"response_format":' + inside, f"response_format.{name}") for inside, name in (
        ("{}", "type"), ('{"type":1}', "type"), ('{"type":"json_schema"}', "json_schema"),
        ('{"type":"text","x":1}', "x"),
        ('{"json_schema":{}}', "json_schema.schema"))),
    ('"top_logprobs":1', "top_logprobs"), ('"echo":true', "echo"),
]
INSIDE_EITHER = [
    *(('"stop":' + stop, place) for stop, place in (
        ("0", "stop"), ("true", "stop"), ("{}", "stop"), ('""', "stop"), ('[""]', "stop[0]"),
        ("[1]", "stop[0]"),
        ('["x",null]', "stop[1]"), ('[["x"]]', "stop[0]"), (json.dumps(["x"] * 17), "stop"),
        (f'"{"x" * 1025}"', "stop"))),
    *(('"logit_bias":{%s}' % bias, f"logit_bias{place}") for bias, place in (
        ('"x":1', ".x"), ('"":1', '[""]'), ('"-1":1', ".-1"), ('"1.0":1', '["1.0"]'), ('" 1":1', '[" 1"]'),
        ('"264":1', ".264"),
        ('"99999999999":1', ".99999999999"), ('"1":101', ".1"), ('"1":-101', ".1"), ('"1":"2"', ".1"),
        ('"1":true', ".1"),
        ('"1":null', ".1"), ('"1":NaN', ".1"), ('"1":1,"1":1', ".1"))),
    ('"logit_bias":' + json.dumps({str(i): 0 for i in range(1025)}), "logit_bias"),
    *(('"stop_token_ids":' + value, place) for value, place in (
        ("[264]", "stop_token_ids[0]"), ("[1,-1]", "stop_token_ids[1]"), ("[true]", "stop_token_ids[0]"),
        ('["1"]', "stop_token_ids[0]"), (json.dumps([1] * 257), "stop_token_ids"))),
    *(('"stream":true,"stream_options":' + value, f"stream_options.{name}") for value, name in (
        ('{"x":1}', "x"), ('{"include_usage":1}', "include_usage"),
        ('{"continuous_usage_stats":"x"}', "continuous_usage_stats"),
        ('{"continuous_usage_stats":true}', "continuous_usage_stats"))),
    ('"stream_options":{}', "stream_options"), ('"metadata":{"a":1}', "metadata.a"), ('"n":1,"n":1', "n"),
    ('"max_tokens":8193', "max_tokens"), ('"min_tokens":8193', "min_tokens"),
    ('"max_tokens":2,"min_tokens":3', "min_tokens"),
    *((f'"{name}":1', name) for name in ("best_of", "logit_biases", "Temperature", "functions",
                                         "use_beam_search", "guided_json", "prompts", "x" * 64, "__class__")),
    ('"a b":1', '["a b"]'), ('"":1', '[""]'), ('"\\u0000":1', '["\\u0000"]'), ('"unknown":null', "unknown"),
    (f'"{"x" * 1000}":1', f'["{"x" * 64}…"]'), ('"metadata":' + '{"a":' * 70 + "1" + "}" * 70, None),
]
PROMPTS = [
    ("0", "prompt"), ("true", "prompt"), ("{}", "prompt"), ("null", "prompt"), ("[]", "prompt"),
    ("[[]]", "prompt[0]"),
    ("[null]", "prompt[0]"), ("[-1]", "prompt[0]"), ("[1,264]", "prompt[1]"), ("[1,1.5]", "prompt[1]"),
    ("[1,true]", "prompt[1]"),
    ('[1,"x"]', "prompt[1]"), ('["x",1]', "prompt[1]"), ('["x",["y"]]', "prompt[1]"),
    ("[[1],1]", "prompt[1]"),
    ('[[1],"x"]', "prompt[1]"), ("[[1],[1,264]]", "prompt[1][1]"), ("[[1],[[1]]]", "prompt[1][0]"),
    ("[[1],[]]", "prompt[1]"),
    ("[NaN]", "prompt[0]"), ("[1e999]", "prompt[0]"), (json.dumps([1] * 8193), "prompt"),
    (json.dumps([1] * 8192), "prompt"),
    (json.dumps([[1], [1] * 8193]), "prompt[1]"), (json.dumps(["x"] * 1025), "prompt"),
    (json.dumps([[1]] * 1025), "prompt"),
    (json.dumps("x" * 9000), "prompt"), (json.dumps(["x", "x" * 9000]), "prompt[1]"),
]
WHOLE = ["", " ", "null", "1", "[]", '"x"', "true", "{", "}", '{"', "{}}", "{'a':1}", '{"a"}', '{"a":}',
         '{"a":1,}', "[" * 100_000, '{"a":' * 100_000, "{}", "\ufeff{}", "nul", "{\"a\":\"\x01\"}",
         '{"a":.5}', '{"a":1.}', '{"a":"\\x"}', "// x", "<xml/>"]
# fmt: on


def _corpus():
    for endpoint, base in BASE.items():
        for fields in (SHARED, OWN[endpoint]):
            for kind, names in fields.items():
                for name in names:
                    before = "" if name == "messages" else base + ","
                    yield from ((endpoint, f'{{{before}"{name}":{wrong}}}', name) for wrong in WRONG[kind])
        inside = INSIDE_EITHER if endpoint == "completion" else INSIDE_EITHER + INSIDE
        for part, place in inside:
            before = "" if part.startswith('"messages"') else base + ","
            yield endpoint, f"{{{before}{part}}}", place
        for body in WHOLE:
            yield endpoint, body, (None if body != "{}" else "messages" if endpoint == "chat" else "prompt")
    yield from (("completion", f'{{"prompt":{prompt}}}', place) for prompt, place in PROMPTS)


CORPUS = list(_corpus())


def test_the_corpus_is_large():
    assert len(CORPUS) >= 300
    assert len({(endpoint, body) for endpoint, body, _ in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize(
    ("endpoint", "body", "param"), [pytest.param(*case, id=f"{case[0]}-{case[1][-60:]!a}") for case in CORPUS]
)
def test_a_malformed_body_is_refused_by_name(endpoint, body, param):
    with pytest.raises(ApiError) as caught:
        PARSE[endpoint](body.encode("utf-8", "surrogatepass"), SERVED)
    error = caught.value
    assert (error.status, error.param, error.type) == (400, param, "invalid_request_error")
    assert (param or "body") in error.message
    assert len(error.message) < 500 and "\n" not in error.message and error.code
    assert json.loads(dumps(error.body()))["error"]["param"] == param


@pytest.mark.parametrize(
    "body", [b"\xff", b'{"messages":"\xc3("}', b"\xfe\xff\x00{", b'{"prompt":"\xed\xb0\x80"}']
)
def test_bodies_that_are_not_utf8_are_refused(body):
    for parse in PARSE.values():
        with pytest.raises(ApiError, match="the body is not UTF-8 at byte") as caught:
            parse(body, SERVED)
        assert caught.value.status == 400


def test_every_prefix_of_a_good_body_is_refused():
    body = (
        '{"temperature":0.5,"max_tokens":10,"stop":["é"],"stream":false,"logit_bias":{"1":2},'
        '"messages":[{"role":"user","content":"H\\u00e9"}]}'
    ).encode()
    parse_chat(body, SERVED)
    for end in range(len(body)):
        with pytest.raises(ApiError) as caught:
            parse_chat(body[:end], SERVED)
        assert caught.value.status == 400
