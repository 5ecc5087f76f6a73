"""What the answers are made of, in the types of the requests: for the OpenAPI document, and for tests."""

from collections.abc import Mapping

from server.fields import AnyOf, Array, Choice, Integer, Null, Number, String, Type
from server.logprobs import LOWEST
from server.objects import AnyObject, Field, Map, Object
from server.tables import COUNT

_COUNT = Integer(0, COUNT)
_LOGPROB = Number(LOWEST, 0)
_FINISH_REASON = Choice(("stop", "length"))
_CHAT_FINISH_REASON = Choice(("stop", "length", "tool_calls"))  # the last: the model calls a tool
_STOP_REASON = AnyOf((Null(), String(), _COUNT))


def _all(**fields: Type) -> dict[str, Field]:
    """Fields that are always there."""
    return {name: Field(type, required=True) for name, type in fields.items()}


def _list(item: Type) -> Array:
    return Array(item, 0, COUNT, "items")


def _or_null(type: Type) -> AnyOf:
    return AnyOf((Null(), type))


def _head(prefix: str, kind: str) -> dict[str, Field]:
    return _all(id=String(pattern=f"{prefix}-[0-9a-f]{{32}}"), object=Choice((kind,)),
                created=Integer(0, 2**53), model=String())


def _ending(reason: Choice) -> dict[str, Field]:
    """How a choice ended, in a reply."""
    return _all(finish_reason=reason, stop_reason=_STOP_REASON)


def _chunk_ending(reason: Choice) -> dict[str, Field]:
    """The same in a chunk, which may be none of the last."""
    return {**_all(finish_reason=_or_null(reason)),
            "stop_reason": Field(_STOP_REASON, "only on a choice's last chunk", has_null=True)}


USAGE = Object(_all(prompt_tokens=_COUNT, total_tokens=_COUNT, completion_tokens=_COUNT))

_TOKEN = _all(token=String(), logprob=_LOGPROB, bytes=_list(Integer(0, 255)))
CHAT_LOGPROBS = Object(_all(content=_list(Object({**_TOKEN, **_all(top_logprobs=_list(Object(_TOKEN)))}))))
COMPLETION_LOGPROBS = Object(_all(
    text_offset=_list(_COUNT), token_logprobs=_list(_or_null(_LOGPROB)), tokens=_list(String()),
    top_logprobs=_list(_or_null(Map(String(), _LOGPROB, COUNT)))))
_PROMPT_LOGPROB = Object(_all(logprob=_LOGPROB, rank=_or_null(_COUNT), decoded_token=String()))
_PROMPT_LOGPROBS = {"prompt_logprobs": Field(_list(_or_null(Map(String(), _PROMPT_LOGPROB, COUNT))),
                                             "where asked for")}

_TRACE = {"x_trace": Field(AnyObject(), "where asked for: sites by name, with shape, positions and values (of "
                           "[top=N] with tokens); if they are many, an id for /v1/traces instead of values")}

_LOGPROBS = _all(logprobs=_or_null(CHAT_LOGPROBS))
_CHUNK_USAGE = {"usage": Field(USAGE, "with stream_options.include_usage: null, but for the last chunk")}
_TEXT_CHOICE = _all(index=_COUNT, text=String(), logprobs=_or_null(COMPLETION_LOGPROBS))

_FUNCTION = Choice(("function",))
_CALL = Object(_all(id=String(1), type=_FUNCTION,
                    function=Object({**_all(name=String(1)), "arguments": Field(
                        String(), "a JSON object; only its beginning where the reply was cut", required=True)})))
_CALL_PART = Object({
    **_all(index=_COUNT), "id": Field(String(1), "only where a call begins"), "type": Field(_FUNCTION),
    "function": Field(Object({"name": Field(String(1)), **_all(arguments=String())}),
                      "the arguments of all parts of a call, joined, are a JSON object", required=True)})
_MESSAGE = Object({
    **_all(role=Choice(("assistant",))),
    "content": Field(_or_null(String()), "null where there are calls and no text", required=True),
    **_all(tool_calls=_list(_CALL))})
_DELTA = Object({"role": Field(Choice(("assistant",))), "content": Field(String()),
                 "tool_calls": Field(_list(_CALL_PART))})

CHAT_COMPLETION = Object({
    **_head("chat", "chat.completion"),
    **_all(choices=_list(Object({**_all(index=_COUNT, message=_MESSAGE), **_LOGPROBS,
                                  **_ending(_CHAT_FINISH_REASON)})),
           usage=USAGE),
    **_PROMPT_LOGPROBS, **_TRACE})
CHAT_CHUNK = Object({
    **_head("chat", "chat.completion.chunk"),
    **_all(choices=_list(Object({**_all(index=_COUNT, delta=_DELTA), **_LOGPROBS,
                                  **_chunk_ending(_CHAT_FINISH_REASON)}))),
    **_CHUNK_USAGE, **_PROMPT_LOGPROBS})
COMPLETION = Object({
    **_head("cmpl", "text_completion"),
    **_all(choices=_list(Object({**_TEXT_CHOICE, **_ending(_FINISH_REASON), **_PROMPT_LOGPROBS})),
           usage=USAGE),
    **_TRACE})
COMPLETION_CHUNK = Object({
    **_head("cmpl", "text_completion"),
    **_all(choices=_list(Object({**_TEXT_CHOICE, **_chunk_ending(_FINISH_REASON), **_PROMPT_LOGPROBS}))),
    **_CHUNK_USAGE})

TOKENIZED = Object(_all(count=_COUNT, max_model_len=_COUNT, tokens=_list(_COUNT)))
DETOKENIZED = Object(_all(prompt=String()))
MODEL = Object(_all(id=String(), object=Choice(("model",)), created=Integer(0, 2**53), owned_by=String(),
                    root=String(), parent=Null(), max_model_len=_COUNT))
MODELS = Object(_all(object=Choice(("list",)), data=_list(MODEL)))
ERROR = Object(_all(error=Object(_all(message=String(1), type=String(1), param=_or_null(String()),
                                      code=_or_null(String())))))

REPLIES: Mapping[str, Object] = {
    "ChatCompletion": CHAT_COMPLETION, "ChatCompletionChunk": CHAT_CHUNK,
    "Completion": COMPLETION, "CompletionChunk": COMPLETION_CHUNK,
    "Tokenized": TOKENIZED, "Detokenized": DETOKENIZED, "Model": MODEL, "ModelList": MODELS, "Error": ERROR,
}
