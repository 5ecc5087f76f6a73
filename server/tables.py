"""The fields of every request: types, ranges, defaults. Validation and the OpenAPI document both read them.

Ranges that depend on what is served come in as numbers: `vocab_size`, `max_context`.
"""

from collections.abc import Mapping
from typing import Any

from llama.engine.request import MAX_LOGPROBS, MAX_SAMPLES, MAX_STOP_STRINGS, SamplingParams
from llama.text.grammar import MAX_CHOICES, MAX_SOURCE
from llama.text.messages import ROLES
from server.fields import AnyOf, Array, Boolean, Choice, Integer, Null, Number, Refused, String
from server.objects import AnyObject, Field, Map, Object, ObjectText, TokenKey

COUNT = 2**31 - 1
MAX_MESSAGES = 8192
MAX_PARTS = 1024
MAX_TOOLS = 128
MAX_TOOL_CALLS = 128
MAX_PROMPTS = 1024
MAX_STOP_LENGTH = 1024
MAX_STOP_IDS = 256
MAX_BIASES = 1024
MAX_LISTED_TOKENS = 2**20  # of /detokenize: what a body of 4 MiB may hold is more than any context

_TAG = String(0, 512)  # what clients write down for themselves

TOOL_CALL = Object({
    "id": Field(String(0, 256)),
    "type": Field(Choice(("function",))),
    "function": Field(Object({
        "name": Field(String(1, 256), required=True),
        "arguments": Field(AnyOf((ObjectText(), AnyObject())), "an object, or JSON in a string"),
    }), required=True),
})

MESSAGE = Object({
    "role": Field(Choice(ROLES), "developer is system; tool and ipython: a tool's result", required=True),
    "content": Field(AnyOf((Null(), String(), Array(Object({
        "type": Field(Choice(("text",)), required=True),
        "text": Field(String(), required=True),
    }), 0, MAX_PARTS, "text parts"))), "text, or text parts, which are joined with a newline", has_null=True),
    "name": Field(String(0, 256)),
    "tool_calls": Field(Array(TOOL_CALL, 0, MAX_TOOL_CALLS, "calls"), "only in a message of the assistant"),
    "tool_call_id": Field(String(0, 256), "the call that a tool's result answers"),
    # OpenAI's replies carry these, and clients send replies back as history. So empty, they say nothing.
    "refusal": Field(Null()),
    "audio": Field(Null()),
    "function_call": Field(Null()),
    "annotations": Field(Array(Null(), 0, 0, "items")),
})
MESSAGES = Array(MESSAGE, 1, MAX_MESSAGES, "messages")

TOOL = Object({
    "type": Field(Choice(("function",)), required=True),
    "function": Field(Object({
        "name": Field(String(pattern="[a-zA-Z0-9_-]{1,64}"), required=True),
        "description": Field(String()),
        "parameters": Field(AnyObject(), "a JSON schema"),
        "strict": Field(Boolean(), "whether the arguments of every call satisfy the schema; with a tool_choice that "
                        "makes a call they do in any case"),
    }), required=True),
})
TOOLS = Array(TOOL, 0, MAX_TOOLS, "tools")

TOOL_CHOICE = AnyOf((
    Choice(("none", "auto", "required")),
    Object({
        "type": Field(Choice(("function",)), required=True),
        "function": Field(Object({"name": Field(String(1, 256), required=True)}), required=True),
    }),
))

RESPONSE_FORMAT = Object({
    "type": Field(Choice(("text", "json_object", "json_schema")), required=True),
    "json_schema": Field(Object({
        "name": Field(String(pattern="[a-zA-Z0-9_-]{1,64}")),
        "description": Field(String()),
        "schema": Field(AnyObject(), "a JSON schema, which the text satisfies", required=True),
        "strict": Field(Boolean(), "the text satisfies the schema in any case"),
    })),
})

STREAM_OPTIONS = Object({
    "include_usage": Field(Boolean(), "one more chunk at the end, with the usage and without choices", False),
    "continuous_usage_stats": Field(Boolean(), "the usage so far in each chunk; needs include_usage", False),
})

TEMPLATE = {
    "add_generation_prompt": Field(Boolean(), "open the assistant's turn; by default true, unless "
                                   "continue_final_message is"),
    "continue_final_message": Field(Boolean(), "leave the last message open, to be gone on with", False),
}

WITHOUT_EFFECT = {
    "user": Field(_TAG, "accepted, without effect"),
    "metadata": Field(Map(String(0, 64), _TAG, 16), "accepted, without effect"),
    "store": Field(Boolean(), "accepted, without effect"),
    "service_tier": Field(_TAG, "accepted, without effect"),
    "safety_identifier": Field(_TAG, "accepted, without effect"),
    "prompt_cache_key": Field(_TAG, "accepted, without effect"),
}


def chat_request(model: str, defaults: SamplingParams, vocab_size: int, has_traces: bool = False) -> Object:
    """/v1/chat/completions. model: the name that is meant where none is given. defaults: the checkpoint's."""
    return Object({
        "model": _model(model),
        "messages": Field(MESSAGES, "the conversation so far", required=True),
        "max_tokens": Field(Integer(1, COUNT), "most new tokens; by default what is left of the context"),
        "max_completion_tokens": Field(Integer(1, COUNT), "the newer name of max_tokens"),
        **_sampling(defaults, vocab_size),
        "logprobs": Field(Boolean(), "report each token's log probability, before temperature", False),
        "top_logprobs": Field(Integer(0, MAX_LOGPROBS), "alternatives beside each token; needs logprobs", 0),
        **_delivery(),
        "tools": Field(TOOLS, "functions that the model may call"),
        "tool_choice": Field(TOOL_CHOICE, 'with tools, by default "auto"; "none" hides them from the model; '
                             '"required" and a name make it call one'),
        "parallel_tool_calls": Field(Boolean(), "only with tools: false for one call at most"),
        **_constraints(),
        "echo": Field(Boolean(), "begin the reply with the text of the message that it continues; needs "
                      "continue_final_message", False),
        **TEMPLATE,
        **_trace(has_traces),
        **WITHOUT_EFFECT,
    })


def completion_request(model: str, defaults: SamplingParams, vocab_size: int, max_context: int,
                       has_traces: bool = False) -> Object:
    """/v1/completions."""
    return Object({
        "model": _model(model),
        "prompt": Field(prompt(vocab_size, max_context), "text, token ids, or a list of them", required=True),
        "suffix": Field(Refused(String(), ": this server continues a text, it does not fill gaps")),
        "max_tokens": Field(Integer(0, COUNT), "most new tokens; 0, with echo, only scores the prompt", 16),
        **_sampling(defaults, vocab_size),
        "logprobs": Field(Integer(0, MAX_LOGPROBS), "report each token's log probability, before temperature "
                          "and penalties, and so many alternatives; with echo, the prompt's too"),
        **_delivery(),
        **_constraints(),
        "echo": Field(Boolean(), "begin the text with the prompt", False),
        **_trace(has_traces),
        **WITHOUT_EFFECT,
    })


def prompt(vocab_size: int, max_context: int) -> AnyOf:
    """What /v1/completions continues."""
    ids = Array(Integer(0, vocab_size - 1), 1, max_context, "token ids")
    texts, lists = Array(String(), 1, MAX_PROMPTS, "texts"), Array(ids, 1, MAX_PROMPTS, "prompts")
    return AnyOf((String(), texts, ids, lists))


def tokenize_request(model: str) -> Object:
    """/tokenize: one of `prompt` and `messages`."""
    return Object({
        "model": _model(model),
        "prompt": Field(String(), "a text; this or messages"),
        "add_special_tokens": Field(Boolean(), "whether a text gets the begin-of-text token before it; by "
                                    "default true; only with prompt"),
        "messages": Field(MESSAGES, "a conversation; this or prompt"),
        "tools": Field(TOOLS, "only with messages"),
        **TEMPLATE,
    })


def detokenize_request(model: str, vocab_size: int) -> Object:
    """/detokenize."""
    return Object({
        "model": _model(model),
        "tokens": Field(Array(Integer(0, vocab_size - 1), 0, MAX_LISTED_TOKENS, "token ids"), required=True),
    })


def _model(default: str) -> Field:
    return Field(String(1, 256), "one of the names that /v1/models lists; any other is 404", default)


def _sampling(defaults: SamplingParams, vocab_size: int) -> Mapping[str, Field]:
    token_id = Integer(0, vocab_size - 1)
    stop = String(1, MAX_STOP_LENGTH)
    values: dict[str, tuple[Any, str, Any]] = {
        "temperature": (Number(0, 2), "0 is greedy", defaults.temperature),
        "top_p": (Number(0, 1, above_low=True), "draw from the likeliest that together reach it",
                  defaults.top_p),
        "top_k": (AnyOf((Integer(-1, -1), Integer(1, COUNT))), "draw from so many likeliest; -1: from all",
                  defaults.top_k),
        "min_p": (Number(0, 1), "draw from those at least so likely, relative to the likeliest", 0.0),
        "frequency_penalty": (Number(-2, 2), "off a generated token's logit each time", 0.0),
        "presence_penalty": (Number(-2, 2), "off a generated token's logit once", 0.0),
        "repetition_penalty": (Number(0, 2, above_low=True), "over prompt and generated tokens; 1 is none",
                               defaults.repetition_penalty),
        "logit_bias": (Map(TokenKey(vocab_size), Number(-100, 100), MAX_BIASES),
                       "what to add to a token's logit", {}),
        "seed": (Integer(-2**63, 2**64 - 1), "the same seed and request, the same output", None),
        "stop": (AnyOf((stop, Array(stop, 0, MAX_STOP_STRINGS, "strings"))),
                 "texts that end the reply, which is cut before", ()),
        "stop_token_ids": (Array(token_id, 0, MAX_STOP_IDS, "token ids"), "ids that end the reply", ()),
        "ignore_eos": (Boolean(), "go on where the model ends its turn", False),
        "min_tokens": (Integer(0, COUNT), "no end before so many tokens", 0),
        "include_stop_str_in_output": (Boolean(), "cut after the stop string, not before", False),
        "skip_special_tokens": (Boolean(), "leave control tokens out of the text", True),
        "n": (Integer(1, MAX_SAMPLES), "how many replies", 1),
        "prompt_logprobs": (Integer(0, MAX_LOGPROBS), "report the prompt's log probabilities, and so many "
                            "alternatives", None),
    }
    return {name: Field(type, note, default) for name, (type, note, default) in values.items()}


def _constraints() -> Mapping[str, Field]:
    """What a reply must be: at most one of these."""
    return {
        "response_format": Field(RESPONSE_FORMAT, "text, any JSON object, or JSON that satisfies a schema"),
        "guided_json": Field(AnyOf((AnyObject(), ObjectText())), "a JSON schema that the text satisfies"),
        "guided_regex": Field(String(1, MAX_SOURCE), "a regular expression that matches the whole text"),
        "guided_choice": Field(Array(String(1), 1, MAX_CHOICES, "texts"), "what the text may be"),
        "guided_grammar": Field(String(1, MAX_SOURCE), "a context-free grammar of the text, as Lark writes them"),
    }


def _trace(is_on: bool) -> Mapping[str, Field]:
    plan = AnyObject() if is_on else Refused(AnyObject(), " here: the server was started without --enable-trace")
    return {"x_trace": Field(plan, "what to capture and to change inside: capture, positions, edits, max_bytes")}


def _delivery() -> Mapping[str, Field]:
    return {"stream": Field(Boolean(), "server-sent events, a piece of text each", False),
            "stream_options": Field(STREAM_OPTIONS, "only with stream")}
