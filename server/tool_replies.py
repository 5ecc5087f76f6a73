"""One choice of a chat with tools, as its deltas tell it: text, and the calls that are found in it."""

from typing import Any

from llama.completion import Delta
from llama.text.certain import CertainCallStream, MoreArguments
from llama.text.tokenizer import Tokenizer
from llama.text.tools import ToolCall, ToolCallStream
from server.call import Call


class ToolReply:
    """Makes the deltas of a reply OpenAI's: {"content"} for text; for a call {"tool_calls"} with index, id and name,
    and then one for each piece of its arguments: where a grammar makes the calls as they grow, else all at once.
    """

    def __init__(self, call: Call, tokenizer: Tokenizer, id: str):
        """id: what the ids of its calls begin with, before their index."""
        self._id = id
        self._num_calls = 0
        self._stream = CertainCallStream(call.tool_names) if call.constraint.makes_calls else ToolCallStream(
            tokenizer, call.tool_names, skip_special_tokens=call.params.skip_special_tokens)

    def read(self, delta: Delta) -> list[dict[str, Any]]:
        """OpenAI's deltas for one of ours; none where nothing is certain yet. The very last is text."""
        found = self._stream.push(delta.text, delta.ids)
        if delta.finish_reason is not None:
            is_cut = delta.finish_reason != "stop" or isinstance(delta.stop_reason, str)
            found += self._stream.finish(is_cut=is_cut)
        parts = [part for each in found for part in self._parts(each)]
        if delta.finish_reason is not None and not (parts and "content" in parts[-1]):
            parts.append({"content": ""})
        return parts

    def finish_reason(self, reason: str | None) -> str | None:
        """What ended the choice, as OpenAI says it: "tool_calls" if the model ended it, and called a tool."""
        return "tool_calls" if reason == "stop" and self._num_calls and not self._stream.is_open else reason

    def _parts(self, found: str | ToolCall | MoreArguments) -> list[dict[str, Any]]:
        if isinstance(found, str):
            return [{"content": found}]
        if isinstance(found, MoreArguments):
            return [self._arguments(found.text)]
        index = self._num_calls
        self._num_calls += 1
        begin = {"index": index, "id": f"{self._id}_{index}", "type": "function",
                 "function": {"name": found.name, "arguments": ""}}
        return [{"tool_calls": [begin]}, *([self._arguments(found.arguments)] if found.arguments else [])]

    def _arguments(self, text: str) -> dict[str, Any]:
        """A piece of the arguments of the call that began last."""
        return {"tool_calls": [{"index": self._num_calls - 1, "function": {"arguments": text}}]}
