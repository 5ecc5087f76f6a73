"""Results as JSON objects: what `llama generate --json` prints, and each line of a batch."""

from collections.abc import Iterable, Sequence
from typing import Any

from llama.completion import Completion
from llama.engine.request import TokenLogprob
from llama.text.tokenizer import Tokenizer


def result_record(tokenizer: Tokenizer, completions: Sequence[Completion]) -> dict[str, Any]:
    """The result of a request: a single sample stands in the object itself, several are a list in it."""
    first = completions[0]
    samples = [_sample(tokenizer, completion) for completion in completions]
    record = dict(samples[0]) if len(samples) == 1 else {"samples": samples}
    if first.prompt_logprobs is not None:
        record["prompt_logprobs"] = _logprobs(tokenizer, first.prompt_logprobs)
    num_prompt = first.usage.prompt_tokens
    num_generated = sum(completion.usage.completion_tokens for completion in completions)
    record["usage"] = {"prompt_tokens": num_prompt, "completion_tokens": num_generated,
                       "total_tokens": num_prompt + num_generated}
    return record


def _sample(tokenizer: Tokenizer, completion: Completion) -> dict[str, Any]:
    record: dict[str, Any] = {"text": completion.text, "finish_reason": completion.finish_reason,
                              "stop_reason": completion.stop_reason}
    if completion.logprobs is not None:
        record["logprobs"] = _logprobs(tokenizer, completion.logprobs)
    return record


def _logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    return [{**_token(tokenizer, logprob.token_id, logprob.logprob),
             "top": [_token(tokenizer, token_id, value) for token_id, value in logprob.top]}
            for logprob in logprobs]


def _token(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> dict[str, Any]:
    text = tokenizer.token_bytes(token_id).decode("utf-8", "replace")
    return {"token": text, "token_id": token_id, "logprob": logprob}
