"""What the protocol's tests serve: a vocabulary of 264 ids, a small template; and what an engine reports."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from llama.completion import RequestReader
from llama.config import LlamaConfig
from llama.engine.request import SamplingParams, TokenEvent, TokenLogprob
from llama.text.chat import ChatTemplate
from llama.text.tokenizer import Tokenizer
from server.protocol import ApiError, Call, Rendering, Served
from tests.text.samples import small_tokenizer

NAME = "llama3_1_8b_instruct"
CONTEXT = 8192
BOS, EOT, VOCAB = 0, 1, 264

TEMPLATE = (
    "<|begin_of_text|>{% for message in messages %}{{ message.role }}:{{ message.content | trim }}<|eot_id|>"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}")


def make_served(**changes: Any) -> Served:
    """A small checkpoint under its default name, whose model has more rows than the tokenizer has ids."""
    config = LlamaConfig(vocab_size=VOCAB + 56, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1,
                         num_kv_heads=1, head_dim=8, max_position_embeddings=CONTEXT, rope_theta=1e4,
                         rope_scaling=None, rms_norm_eps=1e-5, tie_word_embeddings=True)
    facts = {"names": (NAME,), "root": "demo", "tokenizer": Tokenizer(small_tokenizer()),
             "template": ChatTemplate(TEMPLATE), "config": config, "eos_token_ids": (EOT,),
             "max_context": CONTEXT,
             "defaults": SamplingParams(temperature=0.6, top_p=0.9, top_k=-1, repetition_penalty=1.0),
             "created": 1738753000}
    return Served(**(facts | changes))


def chat_body(**fields: Any) -> bytes:
    """A body of /v1/chat/completions, by default with one message."""
    return json.dumps({"messages": [{"role": "user", "content": "Hello"}]} | fields).encode()


def completion_body(**fields: Any) -> bytes:
    """A body of /v1/completions."""
    return json.dumps({"prompt": "Hello"} | fields).encode()


def refused(parse: Callable[[bytes, Served], Any], body: bytes, served: Served | None = None) -> ApiError:
    """The error that a body brings."""
    with pytest.raises(ApiError) as caught:
        parse(body, served or make_served())
    return caught.value


def scored(token_id: int, num_top: int | None) -> TokenLogprob | None:
    """A token as an engine reports it: probabilities made up from the ids, the likeliest first."""
    if num_top is None:
        return None
    top = tuple((rank, -0.25 * (rank + 1)) for rank in range(num_top))
    return TokenLogprob(token_id, dict(top).get(token_id, -20.0 - token_id / 8), top)


def prompt_scores(prompt: Sequence[int], num_top: int) -> list[TokenLogprob]:
    """A prompt as an engine reports it: nothing precedes its first token."""
    return [TokenLogprob(prompt[0], None), *(scored(token_id, num_top) for token_id in prompt[1:])]


def answer(call: Call, served: Served, drawn: Mapping[int, Sequence[int]], rendering: Rendering
           ) -> tuple[list[dict[str, Any]], list[RequestReader]]:
    """Have `drawn` generated, ids for each choice, and written by `rendering`: all chunks, and the readers.

    The choices take turns. One ends with EOT or one of its stop ids, or at its last id, for its length.
    """
    params = call.params
    readers = [RequestReader(served.tokenizer, params, len(prompt)) for prompt in call.prompts]
    for reader, prompt in zip(readers, call.prompts):
        if params.prompt_logprobs is not None:
            reader.prompt_logprobs += prompt_scores(prompt, params.prompt_logprobs)
    chunks = rendering.opening()
    for position in range(max(map(len, drawn.values()))):
        for choice, ids in drawn.items():
            if position >= len(ids):
                continue
            prompt_index, index = divmod(choice, params.n)
            token_id, reason = ids[position], "length" if position == len(ids) - 1 else None
            if token_id == EOT and not params.ignore_eos:
                reason = "stop"
            event = TokenEvent("id", index, token_id, scored(token_id, params.logprobs), reason)
            reader = readers[prompt_index]
            if (delta := reader.read(event)) is not None:
                chunks += rendering.delta(prompt_index, delta, reader.prompt_logprobs)
    return chunks + rendering.closing(), readers
