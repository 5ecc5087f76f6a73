"""The contract without any I/O: request bodies to calls, deltas to JSON (`Rendering`), refusals as ApiError.

    call = parse_chat(body, served)                    or parse_completion
    rendering = Rendering(call, served)
    rendering.opening(), .delta(prompt_index, delta), ..., .closing()        the chunks of a stream
    rendering.reply(all of these chunks)                                     the answer in one piece
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llama.engine.request import RequestError, SamplingParams
from llama.text.chat import ChatTemplate
from llama.text.messages import ChatError, normalize_messages
from llama.text.tokenizer import TokenizerError
from llama.text.tools import BUILTIN_TOOLS
from server.body import read_json
from server.call import Call
from server.constraints import called_tools, read_constraint
from server.errors import ApiError, refusal
from server.fields import FieldError, place_name
from server.objects import Object
from server.rendering import Rendering, dumps
from server.served import Served
from server.traces import with_plan

__all__ = ["ApiError", "Call", "Rendering", "Served", "detokenize", "dumps", "parse_chat", "parse_completion",
           "refusal", "tokenize"]

MAX_CHOICES = 1024  # of one request, all prompts together
MAX_REPORTED = 1_000_000  # log probabilities of prompts in one answer

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
             "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens",
             "include_stop_str_in_output", "skip_special_tokens", "n")


def parse_chat(body: bytes, served: Served, name: str | None = None) -> Call:
    """Read a body of /v1/chat/completions. name: of the model, where the body gives none.

    Raises ApiError: 400, or 404 for a model that is not served.
    """
    values = _read(body, served.chat_request, served, name)
    _check_chat(values)
    ids, echo_text = _encode_chat(values, served)
    limit = _max_tokens_field(values)
    tools = called_tools(values)
    constraint = read_constraint(values, tools)
    params = _params(values, max_tokens=values[limit], prompt_logprobs=values["prompt_logprobs"],
                     logprobs=values["top_logprobs"] if values["logprobs"] else None, grammar=constraint.grammar)
    call = Call("chat", values["model"], (tuple(ids),), params, **_delivery(values),
                echo_texts=(echo_text,) if values["echo"] else (), prompt_logprobs=values["prompt_logprobs"],
                tool_names=tuple(tool["function"]["name"] for tool in tools), constraint=constraint)
    _check_size(call, served, ["messages"], limit)
    return with_plan(call, values["x_trace"], served)


def parse_completion(body: bytes, served: Served) -> Call:
    """Read a body of /v1/completions. Raises ApiError: 400, or 404 for a model that is not served."""
    values = _read(body, served.completion_request, served)
    is_scoring = values["max_tokens"] == 0
    if is_scoring and not values["echo"]:
        raise _refused("max_tokens", "max_tokens must be at least 1; 0 is for echo, which only scores the "
                       "prompt")
    if is_scoring and values["min_tokens"]:
        raise _refused("min_tokens", f"min_tokens is {values['min_tokens']}, but max_tokens 0 asks for none")
    prompts, places = _encode_prompts(values["prompt"], served)
    echo_texts: tuple[str, ...] = ()
    if values["echo"]:
        echo_texts = tuple(_decode(ids, served, place, skip_special_tokens=values["skip_special_tokens"])
                           for ids, place in zip(prompts, places))
    wanted = [values["prompt_logprobs"], values["logprobs"] if values["echo"] else None]
    constraint = read_constraint(values)
    params = _params(values, max_tokens=max(values["max_tokens"], 1), logprobs=values["logprobs"],
                     prompt_logprobs=max((count for count in wanted if count is not None), default=None),
                     grammar=constraint.grammar)
    call = Call("completion", values["model"], prompts, params, **_delivery(values), echo_texts=echo_texts,
                prompt_logprobs=values["prompt_logprobs"], is_scoring=is_scoring, constraint=constraint)
    _check_size(call, served, places, "max_tokens")
    return with_plan(call, values["x_trace"], served)


def tokenize(body: bytes, served: Served) -> dict[str, Any]:
    """The answer of /tokenize. Raises ApiError."""
    values = _read(body, served.tokenize_request, served)
    if (values["prompt"] is None) == (values["messages"] is None):
        raise _refused("prompt", "give one of prompt and messages")
    only_with = ("messages", ("tools", "add_generation_prompt")) if values["messages"] is None \
        else ("prompt", ("add_special_tokens",))
    for name in only_with[1]:
        if values[name] is not None:
            raise _refused(name, f"{name} is only for {only_with[0]}")
    if values["messages"] is None and values["continue_final_message"]:
        raise _refused("continue_final_message", "continue_final_message is only for messages")
    if values["messages"] is None:
        ids = _encode(values["prompt"], served, values["add_special_tokens"] is not False)
    else:
        ids, _ = _encode_chat({**values, "tool_choice": None, "echo": False}, served)
    return {"count": len(ids), "max_model_len": served.max_context, "tokens": ids}


def detokenize(body: bytes, served: Served) -> dict[str, Any]:
    """The answer of /detokenize: the text with its control tokens. Raises ApiError."""
    values = _read(body, served.detokenize_request, served)
    return {"prompt": _decode(values["tokens"], served, "tokens", skip_special_tokens=False)}


# ---- fields -------------------------------------------------------------------------------------------


def _refused(param: str, message: str, code: str = "invalid_value") -> ApiError:
    return ApiError(400, message, param=param, code=code)


def _read(body: bytes, table: Object, served: Served, name: str | None = None) -> dict[str, Any]:
    """All fields of a body, with their defaults. name: of the model, where the body gives none."""
    try:
        values = table.read(read_json(body), model=name or served.names[0])
    except FieldError as error:
        raise ApiError(400, str(error), param=place_name(error.place) or None, code=error.code) from None
    served.refuse_unknown(values["model"])
    return values


def _params(values: Mapping[str, Any], **own: int | str | None) -> SamplingParams:
    try:
        return SamplingParams(**{name: values[name] for name in _SAMPLING}, **own)
    except RequestError as error:
        raise refusal(error) from None


def _delivery(values: Mapping[str, Any]) -> dict[str, bool]:
    """How the answer comes."""
    options = values["stream_options"]
    if options is not None and not values["stream"]:
        raise _refused("stream_options", "stream_options is only for stream: set stream, or leave it out")
    options = options or {}
    if options.get("continuous_usage_stats") and not options.get("include_usage"):
        raise _refused("stream_options.continuous_usage_stats", "stream_options.continuous_usage_stats needs "
                       "include_usage")
    return {"stream": values["stream"], "include_usage": options.get("include_usage", False),
            "continuous_usage": options.get("continuous_usage_stats", False)}


def _check_chat(values: Mapping[str, Any]) -> None:
    """What no field can tell by itself."""
    if values["top_logprobs"] and not values["logprobs"]:
        raise _refused("top_logprobs", "top_logprobs needs logprobs: set it to true")
    if not values["tools"]:
        for name in ("tool_choice", "parallel_tool_calls"):
            if values[name] not in (None, "none"):
                raise _refused(name, f"{name} is only for requests with tools")
    if values["echo"] and not values["continue_final_message"]:
        raise _refused("echo", "echo needs continue_final_message: in a chat it repeats the message that is "
                       "continued")


def _max_tokens_field(values: Mapping[str, Any]) -> str:
    """Which of its two names max_tokens was given by."""
    old, new = values["max_tokens"], values["max_completion_tokens"]
    if old is not None and new is not None and old != new:
        raise _refused("max_completion_tokens", f"max_completion_tokens is {new} and max_tokens {old}, which "
                       "are the same thing: give one of them")
    return "max_tokens" if new is None else "max_completion_tokens"


# ---- prompts ------------------------------------------------------------------------------------------


def _encode_chat(values: Mapping[str, Any], served: Served) -> tuple[list[int], str]:
    """A conversation as ids, and with `echo` the text of its last message as it stands there."""
    if served.template is None:
        raise _refused("messages", f"{served.root} has no chat template; use /v1/completions",
                       "unsupported_value")
    messages, continues = values["messages"], values["continue_final_message"]
    opens = values["add_generation_prompt"]
    builtin, tools = _split_tools(_tools(values), served.template)
    options = {"add_generation_prompt": not continues if opens is None else opens,
               "continue_final_message": continues, "builtin_tools": builtin}
    try:
        ids = served.template.encode(served.tokenizer, messages, tools, **options)
        if not values["echo"]:
            return ids, ""
        text = normalize_messages(messages[-1:])[0]["content"]
        is_whole = served.template.render(messages, tools, **options).endswith(text)
        return ids, text if is_whole else text.strip()  # where templates trim, they do so at both ends
    except (ChatError, TokenizerError) as error:
        raise refusal(error, "messages") from None


def _tools(values: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The tools that the model is told of."""
    return () if values["tool_choice"] == "none" else values["tools"] or ()


def _split_tools(tools: Sequence[Mapping[str, Any]], template: ChatTemplate
                 ) -> tuple[list[str], list[Mapping[str, Any]]]:
    """The names of built-in tools, and the others. A built-in one is asked for by its name alone, without
    description and parameters, of a template that has built-in tools."""
    builtin = [tool["function"]["name"] for tool in tools
               if list(tool["function"]) == ["name"] and tool["function"]["name"] in BUILTIN_TOOLS
               and "builtin_tools" in template.source]
    return builtin, [tool for tool in tools if tool["function"]["name"] not in builtin]


def _encode_prompts(prompt: str | Sequence[Any], served: Served
                    ) -> tuple[tuple[tuple[int, ...], ...], list[str]]:
    """Each prompt's ids, and what to call it in an error."""
    is_one = isinstance(prompt, str) or isinstance(prompt[0], int)
    prompts = [prompt] if is_one else prompt
    places = ["prompt"] if is_one else [f"prompt[{index}]" for index in range(len(prompts))]
    encoded = (_encode(one, served, True, place) if isinstance(one, str) else one
               for one, place in zip(prompts, places))
    return tuple(map(tuple, encoded)), places


def _encode(text: str, served: Served, bos: bool, place: str = "prompt") -> list[int]:
    try:
        return served.tokenizer.encode(text, bos=bos)
    except TokenizerError as error:
        raise refusal(error, place) from None


def _decode(ids: Sequence[int], served: Served, place: str, *, skip_special_tokens: bool) -> str:
    try:
        return served.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    except TokenizerError as error:  # an id that the vocabulary leaves out
        raise refusal(error, place) from None


def _check_size(call: Call, served: Served, places: Sequence[str], limit: str) -> None:
    """What a request may cost. limit: the name by which max_tokens was given."""
    params, context = call.params, served.max_context
    if call.num_choices > MAX_CHOICES:
        raise _refused("n", f"{len(call.prompts)} prompts times n {params.n} are more than {MAX_CHOICES} "
                       "choices")
    for prompt, place in zip(call.prompts, places):
        num_prompt = len(prompt)
        if num_prompt >= context:
            raise _refused(place, f"{place} has {num_prompt} tokens, and the context is {context} tokens for "
                           "it and the reply together; shorten it", "context_length_exceeded")
        for name, count in ((limit, params.max_tokens), ("min_tokens", params.min_tokens)):
            if num_prompt + (count or 0) > context:
                raise _refused(name, f"the {num_prompt} tokens of {place} and {name} {count} together exceed "
                               f"the context of {context} tokens; lower {name} to at most "
                               f"{context - num_prompt}", "context_length_exceeded")
    if params.prompt_logprobs is not None:
        times = params.n if call.kind == "completion" else 1
        reported = sum(map(len, call.prompts)) * times * (1 + params.prompt_logprobs)
        if reported > MAX_REPORTED:
            raise _refused("prompt_logprobs" if call.prompt_logprobs is not None else "logprobs",
                           f"these are {reported} log probabilities of prompts, and an answer reports at "
                           f"most {MAX_REPORTED}; ask for fewer alternatives or shorter prompts")
