"""What the answers are made of, in the types of the requests: for the OpenAPI document, and for tests."""

from collections.abc import Mapping

from server.fields import AnyOf, Array, Choice, Integer, Null, Number, String, Type
from server.logprobs import LOWEST
from server.objects import Field, Map, Object
from server.tables import COUNT

_COUNT = Integer(0, COUNT)
_LOGPROB = Number(LOWEST, 0)
_FINISH_REASON = Choice(("stop", "length"))
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


USAGE = Object(_all(prompt_tokens=_COUNT, total_tokens=_COUNT, completion_tokens=_COUNT))

_TOKEN = _all(token=String(), logprob=_LOGPROB, bytes=_list(Integer(0, 255)))
CHAT_LOGPROBS = Object(_all(content=_list(Object({**_TOKEN, **_all(top_logprobs=_list(Object(_TOKEN)))}))))
COMPLETION_LOGPROBS = Object(_all(
    text_offset=_list(_COUNT), token_logprobs=_list(_or_null(_LOGPROB)), tokens=_list(String()),
    top_logprobs=_list(_or_null(Map(String(), _LOGPROB, COUNT)))))
_PROMPT_LOGPROB = Object(_all(logprob=_LOGPROB, rank=_or_null(_COUNT), decoded_token=String()))
_PROMPT_LOGPROBS = {"prompt_logprobs": Field(_list(_or_null(Map(String(), _PROMPT_LOGPROB, COUNT))),
                                             "where asked for")}

_LOGPROBS = _all(logprobs=_or_null(CHAT_LOGPROBS))
_ENDING = _all(finish_reason=_FINISH_REASON, stop_reason=_STOP_REASON)
_CHUNK_ENDING = {**_all(finish_reason=_or_null(_FINISH_REASON)),
                 "stop_reason": Field(_STOP_REASON, "only on a choice's last chunk", has_null=True)}
_CHUNK_USAGE = {"usage": Field(USAGE, "with stream_options.include_usage: null, but for the last chunk")}
_TEXT_CHOICE = _all(index=_COUNT, text=String(), logprobs=_or_null(COMPLETION_LOGPROBS))

_MESSAGE = Object(_all(role=Choice(("assistant",)), content=String(),
                       tool_calls=Array(Null(), 0, 0, "calls")))
_DELTA = Object({"role": Field(Choice(("assistant",))), "content": Field(String())})

CHAT_COMPLETION = Object({
    **_head("chat", "chat.completion"),
    **_all(choices=_list(Object({**_all(index=_COUNT, message=_MESSAGE), **_LOGPROBS, **_ENDING})),
           usage=USAGE),
    **_PROMPT_LOGPROBS})
CHAT_CHUNK = Object({
    **_head("chat", "chat.completion.chunk"),
    **_all(choices=_list(Object({**_all(index=_COUNT, delta=_DELTA), **_LOGPROBS, **_CHUNK_ENDING}))),
    **_CHUNK_USAGE, **_PROMPT_LOGPROBS})
COMPLETION = Object({
    **_head("cmpl", "text_completion"),
    **_all(choices=_list(Object({**_TEXT_CHOICE, **_ENDING, **_PROMPT_LOGPROBS})), usage=USAGE)})
COMPLETION_CHUNK = Object({
    **_head("cmpl", "text_completion"),
    **_all(choices=_list(Object({**_TEXT_CHOICE, **_CHUNK_ENDING, **_PROMPT_LOGPROBS}))), **_CHUNK_USAGE})

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
