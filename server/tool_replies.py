"""One choice of a chat with tools, as its deltas tell it: text, and the calls that are found in it."""

from typing import Any

from llama.completion import Delta
from llama.text.tokenizer import Tokenizer
from llama.text.tools import ToolCall, ToolCallStream
from server.call import Call


class ToolReply:
    """Makes the deltas of a reply OpenAI's: {"content"} for text, two of {"tool_calls"} for a call, of which
    the first has index, id and name, the second the arguments.

    Without parallel_tool_calls, calls after the first are left out.
    """

    def __init__(self, call: Call, tokenizer: Tokenizer, id: str):
        """id: what the ids of its calls begin with, before their index."""
        self._id = id
        self._most_calls = None if call.parallel_tool_calls else 1
        self._num_calls = 0
        self._stream = ToolCallStream(tokenizer, call.tool_names,
                                      skip_special_tokens=call.params.skip_special_tokens)

    def read(self, delta: Delta) -> list[dict[str, Any]]:
        """OpenAI's deltas for one of ours; none where nothing is certain yet. The very last is text."""
        found = self._stream.push(delta.text, delta.ids)
        if delta.finish_reason is not None:
            is_cut = delta.finish_reason != "stop" or isinstance(delta.stop_reason, str)
            found += self._stream.finish(is_cut=is_cut)
        parts: list[dict[str, Any]] = []
        for each in found:
            parts += [{"content": each}] if isinstance(each, str) else self._call(each)
        if delta.finish_reason is not None and not (parts and "content" in parts[-1]):
            parts.append({"content": ""})
        return parts

    def finish_reason(self, reason: str | None) -> str | None:
        """What ended the choice, as OpenAI says it: "tool_calls" if the model ended it, and called a tool."""
        return "tool_calls" if reason == "stop" and self._num_calls else reason

    def _call(self, call: ToolCall) -> list[dict[str, Any]]:
        index = self._num_calls
        if index == self._most_calls:
            return []
        self._num_calls += 1
        begin = {"index": index, "id": f"{self._id}_{index}", "type": "function",
                 "function": {"name": call.name, "arguments": ""}}
        arguments = {"index": index, "function": {"arguments": call.arguments}}
        return [{"tool_calls": [begin]}, {"tool_calls": [arguments]}]
