"""From deltas to JSON: the chunks of a stream, and the reply that they add up to. There is no other way."""

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from llama.completion import Delta
from llama.engine.request import TokenLogprob
from llama.text.tokenizer import valid_text
from server.call import Call
from server.logprobs import TextOffsets, chat_logprobs, completion_logprobs, prompt_logprobs
from server.served import Served
from server.tool_replies import ToolReply

Chunk = dict[str, Any]

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def dumps(data: Any) -> bytes:
    """JSON on the wire: compact, raw UTF-8, keys in their order; a lone surrogate becomes U+FFFD."""
    text = _ENCODER.encode(data)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return valid_text(text).encode("utf-8")


class Rendering:
    """Writes the answer to one call. Choice `prompt * n + sample` is that sample of that prompt.

    id, created: by default made here, the same in all chunks.
    """

    def __init__(self, call: Call, served: Served, *, id: str | None = None, created: int | None = None):
        prefix = "chat-" if call.kind == "chat" else "cmpl-"
        self.id = prefix + uuid.uuid4().hex if id is None else id
        self.created = int(time.time()) if created is None else created
        self._call = call
        self._tokenizer = served.tokenizer
        self._num_generated = 0
        self._offsets: dict[int, TextOffsets] = {}  # of the choices that have begun
        self._tool_replies: dict[int, ToolReply] = {}  # of these, where there are tools

    def opening(self) -> list[Chunk]:
        """What can be sent before anything is computed: in a chat, the role, once for each choice."""
        if self._call.kind == "completion":
            return []
        return [self._chunk([self._choice(index, {"delta": {"role": "assistant"}})])
                for index in range(self._call.num_choices)]

    def delta(self, prompt_index: int, delta: Delta, prompt_scores: Sequence[TokenLogprob] = ()
              ) -> list[Chunk]:
        """The chunks for one delta; none where it says nothing yet.

        prompt_scores: all log probabilities of that prompt, where params.prompt_logprobs asks for them; they
        are known when the first delta is.
        """
        call, index = self._call, prompt_index * self._call.params.n + delta.index
        chunks = [] if index in self._offsets else self._begin(index, prompt_index, prompt_scores)
        if call.is_scoring:  # the one token was drawn because an engine cannot draw none
            choice = self._choice(index, self._text("")) | {"finish_reason": "length", "stop_reason": None}
            return [*chunks, self._chunk([choice])]
        self._num_generated += len(delta.ids)
        logprobs = None if call.params.logprobs is None else self._logprobs(index, delta.logprobs)
        parts, finish_reason = self._parts(index, delta)
        if not parts and logprobs is not None:
            parts = [self._text("")]
        choices = [self._choice(index, part) for part in parts]
        if choices:
            choices[0]["logprobs"] = logprobs
        if finish_reason is not None:
            choices[-1] |= {"finish_reason": finish_reason, "stop_reason": delta.stop_reason}
        return chunks + [self._chunk([choice]) for choice in choices]

    def closing(self) -> list[Chunk]:
        """What follows all deltas: the usage, unless it is a stream that did not ask for it."""
        if self._call.stream and not self._call.include_usage:
            return []
        return [{**self._chunk([]), "usage": self.usage()}]

    def reply(self, chunks: Iterable[Chunk]) -> dict[str, Any]:
        """The whole answer of a call without stream: all chunks, from the opening to the closing, folded.

        They may come from a generator, and are not kept.
        """
        return fold(chunks)

    def usage(self) -> dict[str, int]:
        """Tokens so far. A prompt counts once, however many choices go on from it."""
        num_prompt = sum(len(prompt) for prompt in self._call.prompts)
        return {"prompt_tokens": num_prompt, "total_tokens": num_prompt + self._num_generated,
                "completion_tokens": self._num_generated}

    # ---- pieces ---------------------------------------------------------------------------------------

    def _chunk(self, choices: list[dict[str, Any]]) -> Chunk:
        call = self._call
        kind = "chat.completion.chunk" if call.kind == "chat" else "text_completion"
        chunk = {"id": self.id, "object": kind, "created": self.created, "model": call.model,
                 "choices": choices}
        if call.include_usage:
            chunk["usage"] = self.usage() if call.continuous_usage else None
        return chunk

    def _text(self, text: str) -> dict[str, Any]:
        """Text, as it stands in a choice."""
        return {"delta": {"content": text}} if self._call.kind == "chat" else {"text": text}

    def _parts(self, index: int, delta: Delta) -> tuple[list[dict[str, Any]], str | None]:
        """What a delta says, a part for each chunk; and why the choice ends here, if it does."""
        if self._call.tool_names:
            reply = self._tool_replies[index]
            return [{"delta": part} for part in reply.read(delta)], reply.finish_reason(delta.finish_reason)
        is_silent = not delta.text and delta.finish_reason is None
        return [] if is_silent else [self._text(delta.text)], delta.finish_reason

    def _choice(self, index: int, part: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, **part, "logprobs": None, "finish_reason": None}

    def _begin(self, index: int, prompt_index: int, prompt_scores: Sequence[TokenLogprob]) -> list[Chunk]:
        """What precedes a choice's own text: the text that it repeats, and the prompt's log probabilities."""
        call, tokenizer = self._call, self._tokenizer
        is_first = not self._offsets
        offsets = self._offsets[index] = TextOffsets(tokenizer, call.params.skip_special_tokens)
        if call.tool_names:
            self._tool_replies[index] = ToolReply(call, tokenizer, f"call_{self.id[-32:]}_{index}")
        logprobs = scores = None
        if call.echoes_logprobs:
            places = [offsets.push(each.token_id) for each in prompt_scores]
            offsets.end()
            logprobs = completion_logprobs(tokenizer, prompt_scores, places, call.params.logprobs)
        if call.prompt_logprobs is not None and (is_first or call.kind == "completion"):
            scores = prompt_logprobs(tokenizer, prompt_scores, call.prompt_logprobs)
        if not call.echo_texts and scores is None:
            return []
        text = self._text(call.echo_texts[prompt_index] if call.echo_texts else "")
        choice = self._choice(index, text) | {"logprobs": logprobs}
        chunk = self._chunk([choice])
        if scores is not None:
            (chunk if call.kind == "chat" else choice)["prompt_logprobs"] = scores
        return [chunk]

    def _logprobs(self, index: int, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Of generated tokens: one entry for each, also for those whose text is held back or cut."""
        if self._call.kind == "chat":
            return chat_logprobs(self._tokenizer, logprobs)
        offsets = [self._offsets[index].push(each.token_id) for each in logprobs]
        return completion_logprobs(self._tokenizer, logprobs, offsets, self._call.params.logprobs)


def fold(chunks: Iterable[Chunk]) -> dict[str, Any]:
    """The reply that a stream with a usage chunk adds up to, chat or completion."""
    choices: dict[int, _Folded] = {}
    reply: dict[str, Any] = {}
    usage, extra = None, {}
    for chunk in chunks:
        reply = reply or {**chunk, "object": chunk["object"].removesuffix(".chunk")}
        usage = chunk.get("usage") or usage
        if "prompt_logprobs" in chunk:
            extra["prompt_logprobs"] = chunk["prompt_logprobs"]
        for choice in chunk["choices"]:
            choices.setdefault(choice["index"], _Folded()).add(choice)
    reply["choices"] = [choices[index].choice(index) for index in sorted(choices)]
    return {**reply, "usage": usage, **extra}


class _Folded:
    """One choice, put together from its parts."""

    def __init__(self) -> None:
        self._is_chat = False
        self._texts: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self._logprobs: dict[str, list[Any]] = {}
        self._ending: dict[str, Any] = {}
        self._extra: dict[str, Any] = {}

    def add(self, part: dict[str, Any]) -> None:
        """The next part of the choice."""
        self._is_chat = "delta" in part
        self._texts.append(part["delta"].get("content", "") if self._is_chat else part["text"])
        for call in part["delta"].get("tool_calls", ()) if self._is_chat else ():
            self._add_call(call)
        for name, values in (part["logprobs"] or {}).items():
            self._logprobs.setdefault(name, []).extend(values)
        if part["finish_reason"] is not None:
            self._ending = {"finish_reason": part["finish_reason"], "stop_reason": part["stop_reason"]}
        if "prompt_logprobs" in part:
            self._extra["prompt_logprobs"] = part["prompt_logprobs"]

    def choice(self, index: int) -> dict[str, Any]:
        """All of it, as it stands in a reply."""
        text = "".join(self._texts)
        content = {"text": text}
        if self._is_chat:
            calls = [self._calls[index] for index in sorted(self._calls)]
            content = {"message": {"role": "assistant", "content": text or (None if calls else ""),
                                   "tool_calls": calls}}
        return {"index": index, **content, "logprobs": self._logprobs or None, **self._ending, **self._extra}

    def _add_call(self, part: dict[str, Any]) -> None:
        """The next part of a call: its beginning has id and name."""
        call = self._calls.get(part["index"])
        if call is None:
            call = {"id": part["id"], "type": part["type"], "function": {"name": part["function"]["name"],
                                                                         "arguments": ""}}
            self._calls[part["index"]] = call
        call["function"]["arguments"] += part["function"]["arguments"]
