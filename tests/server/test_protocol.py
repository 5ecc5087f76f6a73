"""Bodies to calls: what the fields come to mean together, and what is refused with which words."""

import json
import subprocess
import sys

import pytest
import tokenizers

from llama.engine.request import RequestError, SamplingParams
from llama.text.chat import ChatTemplate
from llama.text.messages import ChatError
from llama.text.tokenizer import Tokenizer
from server.protocol import (MAX_CHOICES, MAX_REPORTED, ApiError, detokenize, dumps, parse_chat,
                             parse_completion, refusal)
from tests.server.samples import BOS, CONTEXT, EOT, NAME, chat_body, completion_body, make_served, refused
from tests.text.samples import small_tokenizer

SERVED = make_served()
USER = {"role": "user", "content": "Hello"}
PUBLISHED = (b'{"temperature":0.5,"max_tokens":1024,"top_p":1,"frequency_penalty":0,"presence_penalty":1,'
             b'"stream":false,"model":"llama3_1_8b_instruct","messages":[{"role":"user","content":"Hello"}]}')


def encoded(text: str) -> tuple[int, ...]:
    """A text's ids, with control tokens where their names stand: for prompts written by hand."""
    ids = []
    for i, part in enumerate(text.replace("<|eot_id|>", "<|begin_of_text|>\0").split("<|begin_of_text|>")):
        ids += [] if i == 0 else [EOT if part.startswith("\0") else BOS]
        ids += SERVED.tokenizer.encode(part.removeprefix("\0"))
    return tuple(ids)


def test_the_published_request_is_understood():
    call = parse_chat(PUBLISHED, SERVED)
    assert (call.kind, call.model, call.stream, call.include_usage) == ("chat", NAME, False, False)
    assert call.prompts == (encoded("<|begin_of_text|>user:Hello<|eot_id|>assistant:"),)
    assert call.params == SamplingParams(max_tokens=1024, temperature=0.5, top_p=1.0, top_k=-1,
                                         presence_penalty=1.0, repetition_penalty=1.0)


def test_what_is_not_given_is_the_checkpoints_or_the_contracts_default():
    own = {"temperature": 0.25, "top_p": 0.75, "top_k": 7, "repetition_penalty": 1.5}
    served = make_served(defaults=SamplingParams(**own))
    assert parse_chat(chat_body(), served).params == SamplingParams(max_tokens=None, **own)
    assert parse_completion(completion_body(), served).params == SamplingParams(max_tokens=16, **own)
    assert parse_chat(chat_body(temperature=0), served).params.temperature == 0


def test_every_sampling_field_reaches_the_engine():
    fields = {"temperature": 0.1, "top_p": 0.2, "top_k": 3, "min_p": 0.4, "frequency_penalty": 0.5,
              "presence_penalty": 0.6, "repetition_penalty": 0.7, "seed": 8, "stop": ["x", "y"],
              "stop_token_ids": [9], "ignore_eos": True, "min_tokens": 1,
              "include_stop_str_in_output": True, "skip_special_tokens": False, "n": 2,
              "prompt_logprobs": 3, "max_tokens": 12}
    expected = SamplingParams(**fields, logit_bias={5: -1.5}, logprobs=4)
    fields["logit_bias"] = {"5": -1.5}
    assert parse_chat(chat_body(**fields, logprobs=True, top_logprobs=4), SERVED).params == expected
    assert parse_completion(completion_body(**fields, logprobs=4), SERVED).params == expected


def test_a_stop_string_may_stand_alone():
    assert parse_chat(chat_body(stop="x"), SERVED).params.stop == ("x",)


def test_both_names_of_max_tokens():
    assert parse_chat(chat_body(max_completion_tokens=5), SERVED).params.max_tokens == 5
    assert parse_chat(chat_body(max_completion_tokens=5, max_tokens=5), SERVED).params.max_tokens == 5
    error = refused(parse_chat, chat_body(max_completion_tokens=5, max_tokens=6))
    assert (error.status, error.param) == (400, "max_completion_tokens")


def test_log_probabilities_are_reported_where_they_are_asked_for():
    assert parse_chat(chat_body(), SERVED).params.logprobs is None
    assert parse_chat(chat_body(logprobs=True), SERVED).params.logprobs == 0
    assert parse_chat(chat_body(logprobs=False, top_logprobs=0), SERVED).params.logprobs is None
    assert refused(parse_chat, chat_body(top_logprobs=1)).param == "top_logprobs"
    assert parse_completion(completion_body(logprobs=0), SERVED).params.logprobs == 0


# ---- models and streams --------------------------------------------------------------------------------


def test_other_names_are_404():
    served = make_served(names=("first", "second"))
    assert parse_chat(chat_body(), served).model == "first"
    assert parse_completion(completion_body(model="second"), served).model == "second"
    error = refused(parse_chat, chat_body(model="gpt\n4"), served)
    assert (error.status, error.param, error.code) == (404, "model", "model_not_found")
    assert error.message == "the model 'gpt\\n4' is not served here; use first or second"
    assert served.models()["data"][1] == {
        "id": "second", "object": "model", "created": 1738753000, "owned_by": "llama", "root": "demo",
        "parent": None, "max_model_len": CONTEXT}


def test_stream_options_are_for_streams():
    call = parse_chat(chat_body(stream=True, stream_options={"include_usage": True}), SERVED)
    assert (call.stream, call.include_usage, call.continuous_usage) == (True, True, False)
    for parse, body in ((parse_chat, chat_body), (parse_completion, completion_body)):
        error = refused(parse, body(stream_options={"include_usage": True}))
        assert error.message == "stream_options is only for stream: set stream, or leave it out"


# ---- the context ---------------------------------------------------------------------------------------


def test_prompt_and_reply_must_fit_the_context():
    served = make_served(max_context=40)
    ids = [5] * 30
    assert parse_completion(completion_body(prompt=ids, max_tokens=10), served).params.max_tokens == 10
    error = refused(parse_completion, completion_body(prompt=ids, max_tokens=11), served)
    assert (error.param, error.code) == ("max_tokens", "context_length_exceeded")
    assert error.message == ("the 30 tokens of prompt and max_tokens 11 together exceed the context of "
                             "40 tokens; lower max_tokens to at most 10")
    error = refused(parse_completion, completion_body(prompt=[[5], [5] * 38, [5] * 39]), served)
    assert error.param == "max_tokens" and "38 tokens of prompt[1]" in error.message
    error = refused(parse_chat, chat_body(max_completion_tokens=99), served)
    assert error.param == "max_completion_tokens"
    assert "of messages and max_completion_tokens 99" in error.message
    error = refused(parse_completion, completion_body(prompt="a" * 40, max_tokens=1), served)
    assert error.param == "prompt" and error.message.startswith("prompt has 41 tokens")
    error = refused(parse_chat, chat_body(min_tokens=1000), served)
    assert error.param == "min_tokens"


def test_a_full_context_leaves_no_room_for_a_token():
    served = make_served(max_context=40)
    parse_completion(completion_body(prompt=[5] * 39, max_tokens=1), served)
    for max_tokens in (0, 1):
        body = completion_body(prompt=[5] * 40, echo=True, max_tokens=max_tokens)
        error = refused(parse_completion, body, served)
        assert (error.param, error.code) == ("prompt", "context_length_exceeded")
        assert error.message.startswith("prompt has 40 tokens, and the context is 40 tokens")


def test_min_tokens_above_max_tokens_is_the_layers_belows_refusal():
    error = refused(parse_chat, chat_body(min_tokens=3, max_tokens=2))
    assert (error.status, error.param) == (400, "min_tokens")
    assert error.message == "min_tokens 3 is more than max_tokens 2"


def test_choices_have_a_bound():
    prompts = ["x"] * (MAX_CHOICES // 16)
    assert parse_completion(completion_body(prompt=prompts, n=16), SERVED).num_choices == MAX_CHOICES
    error = refused(parse_completion, completion_body(prompt=[*prompts, "x"], n=16))
    assert (error.param, error.message) == ("n", "65 prompts times n 16 are more than 1024 choices")


def test_reported_prompts_have_a_bound():
    ids = [5] * 2500  # times 21, n 16
    served = make_served()
    fits = MAX_REPORTED // (21 * 2500)
    parse_completion(completion_body(prompt=[ids] * fits, echo=True, logprobs=20), served)
    body = {"prompt": [ids] * (fits + 1), "echo": True, "logprobs": 20}
    assert refused(parse_completion, completion_body(**body)).param == "logprobs"
    body = completion_body(prompt=[ids] * 2, n=16, prompt_logprobs=20)
    assert refused(parse_completion, body).param == "prompt_logprobs"
    parse_completion(completion_body(prompt=[ids] * (fits + 1), logprobs=20), served)  # of what is generated
    messages = [USER | {"content": "x" * 4000}]
    parse_chat(chat_body(n=16, prompt_logprobs=20, messages=messages), served)  # once, not n times


# ---- prompts -------------------------------------------------------------------------------------------


def test_prompts_of_every_form():
    hello = (BOS, *SERVED.tokenizer.encode("Hello"))
    for prompt, expected in (("Hello", (hello,)), (["Hello", ""], (hello, (BOS,))), ([5, 6], ((5, 6),)),
                             ([[5, 6], [7]], ((5, 6), (7,)))):
        assert parse_completion(completion_body(prompt=prompt), SERVED).prompts == expected


def test_control_tokens_in_text_are_text():
    for call in (parse_completion(completion_body(prompt="<|eot_id|>"), SERVED),
                 parse_chat(chat_body(messages=[USER | {"content": "<|eot_id|>"}]), SERVED)):
        assert call.prompts[0].count(EOT) == (call.kind == "chat")


def test_echo_returns_the_prompt_as_it_was_sent():
    texts = ["Hello, 🦙!", ""]
    assert parse_completion(completion_body(prompt=texts, echo=True), SERVED).echo_texts == tuple(texts)
    ids = [BOS, *SERVED.tokenizer.encode("ab"), EOT]
    assert parse_completion(completion_body(prompt=ids, echo=True), SERVED).echo_texts == ("ab",)
    call = parse_completion(completion_body(prompt=ids, echo=True, skip_special_tokens=False), SERVED)
    assert call.echo_texts == ("<|begin_of_text|>ab<|eot_id|>",)
    assert parse_completion(completion_body(), SERVED).echo_texts == ()


def test_echo_with_log_probabilities_asks_the_engine_for_the_prompts():
    call = parse_completion(completion_body(echo=True, logprobs=1), SERVED)
    assert (call.params.prompt_logprobs, call.prompt_logprobs, call.echoes_logprobs) == (1, None, True)
    call = parse_completion(completion_body(echo=True, logprobs=1, prompt_logprobs=3), SERVED)
    assert (call.params.prompt_logprobs, call.prompt_logprobs) == (3, 3)
    call = parse_completion(completion_body(echo=True, logprobs=5, prompt_logprobs=0), SERVED)
    assert (call.params.prompt_logprobs, call.prompt_logprobs) == (5, 0)
    call = parse_completion(completion_body(logprobs=1), SERVED)
    assert call.params.prompt_logprobs is None and not call.echoes_logprobs


def test_max_tokens_0_with_echo_scores_the_prompt():
    call = parse_completion(completion_body(echo=True, max_tokens=0, logprobs=1), SERVED)
    assert call.is_scoring and call.params.max_tokens == 1
    assert not parse_completion(completion_body(echo=True, max_tokens=1, logprobs=1), SERVED).is_scoring
    assert refused(parse_completion, completion_body(max_tokens=0)).param == "max_tokens"
    body = completion_body(max_tokens=0, echo=True, min_tokens=1)
    assert refused(parse_completion, body).param == "min_tokens"


def test_a_message_can_be_continued_and_repeated():
    parts = [{"type": "text", "text": " 4"}, {"type": "text", "text": "2 "}]
    messages = [USER, {"role": "assistant", "content": parts}]
    prompt = encoded("<|begin_of_text|>user:Hello<|eot_id|>assistant:4\n2")
    call = parse_chat(chat_body(messages=messages, continue_final_message=True), SERVED)
    assert (call.prompts, call.echo_texts) == ((prompt,), ())
    call = parse_chat(chat_body(messages=messages, continue_final_message=True, echo=True), SERVED)
    assert (call.prompts, call.echo_texts) == ((prompt,), ("4\n2",))  # as the template trims it
    untrimmed = make_served(template=ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}"))
    call = parse_chat(chat_body(messages=messages, continue_final_message=True, echo=True), untrimmed)
    assert call.echo_texts == (" 4\n2 ",)


def test_continuing_and_opening_exclude_each_other():
    error = refused(parse_chat, chat_body(continue_final_message=True, add_generation_prompt=True))
    assert error.message == "add_generation_prompt and continue_final_message exclude each other: unset one"
    call = parse_chat(chat_body(add_generation_prompt=False), SERVED)
    assert call.prompts == (encoded("<|begin_of_text|>user:Hello<|eot_id|>"),)


def test_refusals_from_below_are_400_and_name_the_place():
    error = refused(parse_chat, chat_body(messages=[USER, {"role": "user"}]))
    assert (error.param, error.message) == ("messages[1].content", "messages[1].content is missing")
    error = refused(parse_chat, chat_body(messages=[USER | {"tool_calls": [{"function": {"name": "f"}}]}]))
    assert error.param == "messages[0].tool_calls"
    strict = make_served(template=ChatTemplate("{{ raise_exception('no ' + messages[0].role) }}"))
    error = refused(parse_chat, chat_body(), strict)
    assert (error.param, error.message) == ("messages", "the chat template refused the conversation: no user")
    error = refused(parse_chat, chat_body(), make_served(template=None))
    assert (error.param, error.message) == ("messages", "demo has no chat template; use /v1/completions")
    assert refusal(RequestError("n", "n is 9, but at most 8 sequences run at once")).param == "n"
    error = ChatError("messages[1].tool_calls[0].x is wrong")
    assert refusal(error, "messages").param == "messages[1].tool_calls[0].x"


def test_odd_vocabularies_bring_refusals_not_crashes():
    backend = small_tokenizer()
    backend.add_special_tokens(["ab"])  # which plain text becomes, too
    odd = make_served(tokenizer=Tokenizer(backend))
    for parse, body, param in ((parse_completion, completion_body(prompt=["x", "ab"]), "prompt[1]"),
                               (parse_chat, chat_body(messages=[USER | {"content": "ab"}]), "messages")):
        error = refused(parse, body, odd)
        assert (error.status, error.param) == (400, param) and "special token ab" in error.message
    spelled = json.loads(small_tokenizer().to_str())
    spelled["model"]["vocab"]["ba"] = 300  # so that 261 is nobody's
    odd = make_served(tokenizer=Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spelled))))
    body = completion_body(prompt=[[5], [261]], echo=True)
    assert refused(parse_completion, body, odd).param == "prompt[1]"
    assert refused(detokenize, b'{"tokens":[261]}', odd).param == "tokens"


# ---- the error itself ----------------------------------------------------------------------------------


def test_errors_have_openais_shape():
    error = ApiError(429, "later", retry_after=3)
    assert dumps(error.body()) == (
        b'{"error":{"message":"later","type":"rate_limit_error","param":null,"code":null}}')
    assert [ApiError(status, "x").type for status in (400, 401, 404, 503)] == [
        "invalid_request_error", "authentication_error", "invalid_request_error", "server_error"]
    assert ApiError(400, "x", type="y").type == "y"


def test_json_is_compact_raw_and_always_utf8():
    assert dumps({"b": "é\u2028🦙", "a": [None, 1.5]}) == '{"b":"é\u2028🦙","a":[null,1.5]}'.encode()
    assert dumps({"x": "\ud800a\udc00"}) == '{"x":"\ufffda\ufffd"}'.encode()
    with pytest.raises(ValueError):
        dumps(float("nan"))


def test_a_clients_lone_surrogates_do_no_harm():
    body = b'{"messages":[{"role":"user","content":"\\ud83e\\udd99\\ud800"}],"\\ud800":1}'
    dumps(refused(parse_chat, body).body())
    call = parse_chat(body.replace(b',"\\ud800":1', b""), SERVED)
    assert "🦙\ufffd" in SERVED.tokenizer.decode(call.prompts[0])


def test_the_protocol_does_not_import_torch():
    program = "import sys, server.protocol, server.openapi; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
