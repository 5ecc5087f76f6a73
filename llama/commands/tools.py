"""`llama chat --tools FILE.py`: the functions of a file, run where the model calls them and somebody agrees."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama.commands import CommandError
from llama.terminal import note, read_line
from llama.text.functions import ToolError, call_function, tool_schema
from llama.text.tools import ToolCall

MAX_ROUNDS = 8  # of calls after one question: a model that only calls would never answer


class Tools:
    """The functions by name, and what the model is told of them. asks: whether each call must be agreed to."""

    def __init__(self, functions: dict[str, Callable[..., Any]], asks: bool = True):
        self.definitions = [tool_schema(function) for function in functions.values()]
        self._functions = functions
        self._asks = asks

    @classmethod
    def from_file(cls, path: str, asks: bool) -> "Tools":
        """The public functions that a Python file defines. Runs it. Raises CommandError, ToolError."""
        if not Path(path).is_file():
            raise CommandError(f"--tools: there is no file {path}")
        try:
            names = runpy.run_path(path, run_name="tools")
        except Exception as error:
            raise CommandError(f"--tools: {path} cannot be run: {type(error).__name__}: {error}") from error
        functions = {name: value for name, value in names.items() if not name.startswith("_")
                     and callable(value) and getattr(value, "__module__", None) == "tools"
                     and not isinstance(value, type)}
        if not functions:
            raise CommandError(f"--tools: {path} defines no function whose name does not begin with _")
        try:
            return cls(functions, asks)
        except ToolError as error:
            raise CommandError(f"--tools: {path}: {error}") from error

    @property
    def names(self) -> list[str]:
        """What can be called."""
        return [definition["function"]["name"] for definition in self.definitions]

    def answer(self, call: ToolCall) -> str:
        """Show a call, ask, and run it: what it returned or raised, or that it was not allowed.

        Raises KeyboardInterrupt where somebody would rather stop.
        """
        note(f"{call.name}({_shown(call.arguments)})")
        if self._asks:
            try:
                agreed = read_line("run it? [y/N] ").strip().lower() in ("y", "yes")
            except EOFError:
                agreed = False
            if not agreed:
                return "The user did not allow this call."
        result = call_function(self._functions[call.name], call.arguments)
        note(f"= {result}")
        return result


def _shown(arguments: str) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in json.loads(arguments).items())
