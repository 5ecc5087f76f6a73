"""Log probabilities as clients read them: OpenAI's two forms, for chats and for completions, and vLLM's for
prompts."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Any

from llama.engine.request import TokenLogprob
from llama.text.tokenizer import Tokenizer

# What OpenAI reports for a token that has next to no chance; JSON has no infinity.
LOWEST = -9999.0


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token by itself: its text, or where that is not whole characters, its bytes as `bytes:\\xf0\\x9f`."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> dict[str, Any]:
    """Chat: {content: [{token, logprob, bytes, top_logprobs}]}."""
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        return {"token": token_text(tokenizer, token_id), "logprob": max(LOWEST, logprob),
                "bytes": list(tokenizer.token_bytes(token_id))}

    return {"content": [{**entry(each.token_id, each.logprob),
                         "top_logprobs": [entry(*one) for one in each.top]} for each in logprobs]}


def completion_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob], offsets: Sequence[int],
                        num_top: int) -> dict[str, Any]:
    """Completions: {text_offset, token_logprobs, tokens, top_logprobs}, a list each.

    top_logprobs has the `num_top` likeliest tokens and the token itself. A prompt's first token has null in
    it and in token_logprobs: nothing precedes it.
    """
    def top(each: TokenLogprob) -> dict[str, float] | None:
        if each.logprob is None:
            return None
        pairs = dict(each.top[:num_top]) | {each.token_id: each.logprob}
        return {token_text(tokenizer, token_id): max(LOWEST, logprob) for token_id, logprob in pairs.items()}

    return {
        "text_offset": list(offsets),
        "token_logprobs": [None if each.logprob is None else max(LOWEST, each.logprob) for each in logprobs],
        "tokens": [token_text(tokenizer, each.token_id) for each in logprobs],
        "top_logprobs": [top(each) for each in logprobs],
    }


def prompt_logprobs(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob], num_top: int
                    ) -> list[dict[str, Any] | None]:
    """Prompts: for each token an object by ids, its own first: {id: {logprob, rank, decoded_token}}; null for
    the first. rank counts from 1, and is null where the token is not among the `num_top` likeliest."""
    def entries(each: TokenLogprob) -> dict[str, Any] | None:
        if each.logprob is None:
            return None
        top = dict(each.top[:num_top])
        ranks = {token_id: rank for rank, token_id in enumerate(top, start=1)}
        return {str(token_id): {"logprob": max(LOWEST, logprob), "rank": ranks.get(token_id),
                                "decoded_token": token_text(tokenizer, token_id)}
                for token_id, logprob in ({each.token_id: each.logprob} | top).items()}

    return [entries(each) for each in logprobs]


class TextOffsets:
    """Where in a text its tokens begin, in characters.

    A token that goes on with a character of the one before begins where that character does; a control token
    that is left out of the text begins where the text before it ends.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._end = 0

    def push(self, token_id: int) -> int:
        """The offset of the next token."""
        raw = self._tokenizer.token_bytes(token_id)
        is_shown = not (self._skip_special_tokens and self._tokenizer.is_special(token_id))
        if is_shown and raw[0] & 0xC0 != 0x80:  # it begins a character: one that was open stays incomplete
            self.end()
        offset = self._end
        if is_shown:
            self._end += len(self._decoder.decode(raw))
        return offset

    def end(self) -> None:
        """What follows begins anew: it does not complete a character that is still open."""
        self._end += len(self._decoder.decode(b"", final=True))
        self._decoder.reset()
