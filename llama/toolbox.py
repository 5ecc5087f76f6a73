"""The tools of one conversation: what the model is told of them, what its reply is held to, which calls are in it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from llama.completion import Completion
from llama.engine.request import RequestError, SamplingParams
from llama.text.certain import CertainCallStream
from llama.text.functions import tool_schema
from llama.text.tokenizer import Tokenizer
from llama.text.toolgrammar import calls
from llama.text.tools import ToolCallStream


class Toolbox:
    """Tools, and whether one must be called. definitions: as the chat template takes them; none if none may be."""

    def __init__(self, tools: Sequence[Callable[..., Any] | Mapping[str, Any]], choice: str = "auto",
                 builtin_names: Sequence[str] = ()):
        """choice: "auto", "none", "required", or a tool's name. Raises RequestError, ToolError."""
        self.definitions = [] if choice == "none" else [tool_schema(tool) for tool in tools]
        names = [tool["function"]["name"] for tool in self.definitions]
        self._names = [*names, *builtin_names]
        if choice not in ("auto", "none", "required", *names):
            raise RequestError("tool_choice", f"tool_choice must be auto, none, required or the name of a tool, not "
                               f"{choice!r}")
        if choice == "required" and not self.definitions:
            raise RequestError("tool_choice", "tool_choice is required, but there are no tools")
        self._choice = choice

    def constrain(self, params: SamplingParams) -> SamplingParams:
        """The parameters, with the grammar of the call that must be made. Raises RequestError, GrammarError."""
        if not self._must_call:
            return params
        if params.grammar is not None:
            raise RequestError("grammar", "a grammar does not go with a tool_choice that makes a call")
        chosen = [(tool, f"tools[{index}]") for index, tool in enumerate(self.definitions)
                  if self._choice in ("required", tool["function"]["name"])]
        most = {} if self._choice == "required" else {"most": 1}
        return replace(params, grammar=calls(*zip(*chosen), **most))

    def read(self, answer: Completion | list[Completion], tokenizer: Tokenizer) -> Completion | list[Completion]:
        """The answer, with the calls that are in it."""
        if not self._names:
            return answer
        if isinstance(answer, list):
            return [self.read(one, tokenizer) for one in answer]
        return answer.with_calls(self.stream(tokenizer))

    def stream(self, tokenizer: Tokenizer) -> ToolCallStream | CertainCallStream:
        """What finds the calls in one reply."""
        return CertainCallStream(self._names) if self._must_call else ToolCallStream(tokenizer, self._names)

    @property
    def _must_call(self) -> bool:
        return self._choice not in ("auto", "none")
