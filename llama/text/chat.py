"""Messages to a prompt, by the checkpoint's own chat template, a Jinja program that runs in a sandbox.

Text is text, whatever the template does. For encoding, each special token's name in the template's *source*
is replaced by a mark that no caller can write; after rendering, only the marks become control ids. The
callers' strings are left as they are, so that nothing a template does to them (trim, join, tojson, slicing,
...) can turn them, or a piece of them, into a control token; a template that looks for one there finds
none.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llama.text.messages import ChatError, normalize_messages, normalize_tools, one_call_each, plain_json
from llama.text.tokenizer import BEGIN_OF_TEXT, Tokenizer, read_tokenizer_config, token_name

__all__ = ["ChatError", "ChatTemplate"]

# Marks are made with lone surrogates: valid text has none, and the callers' data is made valid first.
_MARK = re.compile("\ud800([0-9]+)\ud801")
_END = "\ud802"  # of the last message's content
_SPACE = "\x1f"  # white space that no template writes

# Two turns of each kind: enough to see whether a template spells its control tokens out.
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}) * 2


class _Refusal(jinja2.TemplateError):
    """The template called raise_exception."""


class ChatTemplate:
    """A compiled chat template. Instances may be shared between threads."""

    def __init__(self, source: str, bos_token: str = BEGIN_OF_TEXT, eos_token: str = "<|eot_id|>"):
        """Compiles Jinja `source`. Raises ChatError on a syntax error, naming the line."""
        self.source = source
        self.bos_token = bos_token
        self.eos_token = eos_token
        self._marked: tuple[Mapping[str, int], ChatTemplate] | None = None
        try:
            self._program = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            message = f"the chat template has a syntax error in line {error.lineno}: {error.message}"
            raise ChatError(message) from error

    @classmethod
    def from_directory(cls, directory: str | Path) -> "ChatTemplate | None":
        """Reads a checkpoint's chat_template.jinja, or else the `chat_template` of tokenizer_config.json.

        Of several templates, the one named "default" is taken. None where the directory has no template.
        Raises ChatError, naming the file, or TokenizerError where tokenizer_config.json is not JSON.
        """
        directory = Path(directory)
        config = read_tokenizer_config(directory)
        file = directory / "chat_template.jinja"
        try:
            if file.is_file():
                source = file.read_text(encoding="utf-8")
            else:
                file = directory / "tokenizer_config.json"
                source = _configured_template(config)
            if source is None:
                return None
            bos_token = token_name(config, "bos_token", BEGIN_OF_TEXT)
            return cls(source, bos_token, token_name(config, "eos_token", "<|eot_id|>"))
        except (ChatError, UnicodeDecodeError) as error:
            raise ChatError(f"{file}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        builtin_tools: Sequence[str] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        date_string: str | None = None,
        tools_in_user_message: bool | None = None,
    ) -> str:
        """The prompt as text, to look at; for the model use `encode`, which knows control tokens from text.

        `messages` and `tools` are OpenAI's (see llama.text.messages). `continue_final_message` leaves the
        last message open, for the model to go on with; `add_generation_prompt` opens one of the assistant's.
        The other options are the template's variables, passed on where they are given. Several tool calls in
        one message become a message each where the template takes only one. Raises ChatError.
        """
        if add_generation_prompt and continue_final_message:
            raise ChatError("add_generation_prompt and continue_final_message exclude each other: unset one")
        if isinstance(builtin_tools, str):
            raise ChatError("builtin_tools must be a list of names")
        plain = normalize_messages(messages)
        variables = {
            "tools": normalize_tools(tools),
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
        }
        options = {
            "builtin_tools": builtin_tools or None,
            "date_string": date_string,
            "tools_in_user_message": tools_in_user_message,
        }
        for name, value in options.items():
            if value is not None:
                variables[name] = plain_json(value, name)
        if continue_final_message:
            return self._render_open(plain, variables)
        return self._render(plain, variables)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> list[int]:
        """The prompt as ids, of which only those that the template itself writes are control tokens.

        Takes the options of `render`. Raises ChatError.
        """
        pieces = _MARK.split(self._for(tokenizer).render(messages, tools, **options))
        # text, id, text, id, ..., text
        return tokenizer.encode_prompt(int(piece) if i % 2 else piece for i, piece in enumerate(pieces))

    def _for(self, tokenizer: Tokenizer) -> "ChatTemplate":
        """This template with a mark for each of the tokenizer's special tokens that its source names."""
        known, special_tokens = self._marked, tokenizer.special_tokens
        if known is not None and known[0] is special_tokens:
            return known[1]
        longest_first = sorted(special_tokens, key=len, reverse=True)
        names = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

        def mark(text: str) -> str:
            return names.sub(lambda name: f"\ud800{special_tokens[name[0]]}\ud801", text)

        marked = ChatTemplate(mark(self.source), mark(self.bos_token), mark(self.eos_token))
        _refuse_assembled_names(marked, names)
        self._marked = (special_tokens, marked)
        return marked

    def _render(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        try:
            try:
                return self._program.render(messages=messages, **variables)
            except _Refusal:  # perhaps of several tool calls in one message
                return self._program.render(messages=one_call_each(messages), **variables)
        except _Refusal as error:
            raise ChatError(f"the chat template refused the conversation: {error}") from error
        except Exception as error:  # a template is somebody's program: whatever it raises, it failed
            raise ChatError(f"the chat template failed: {error}") from error

    def _render_open(self, messages: list[dict[str, Any]], variables: dict[str, Any]) -> str:
        """The rendering up to the end of the last message's content."""
        content = messages[-1]["content"]
        if not isinstance(content, str) or "tool_calls" in messages[-1]:
            raise ChatError("continue_final_message needs a last message that is text, without tool_calls")

        def render_to(ending: str) -> tuple[str, str]:
            """The rendering before and after the end of a last message with the content `ending`."""
            last = {**messages[-1], "content": ending}
            before, end, after = self._render([*messages[:-1], last], variables).rpartition(_END)
            if not end:
                raise ChatError("continue_final_message: the chat template drops the last message's content")
            return before, after

        # Where the template trims content, the finished turn ends without white space: so must the open one.
        _, after = render_to(content + _END + _SPACE)
        before, _ = render_to((content if after.startswith(_SPACE) else content.rstrip()) + _END)
        return before.replace(_END, "")


def _configured_template(config: dict[str, Any]) -> str | None:
    """The `chat_template` of tokenizer_config.json: a string, or a list of {"name", "template"}."""
    source = config.get("chat_template")
    if isinstance(source, list):
        named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
        source = named[0].get("template") if named else source
    if source is not None and not isinstance(source, str):
        raise ChatError("chat_template must be a string, or a list with a template named 'default'")
    return source


def _refuse_assembled_names(marked: ChatTemplate, names: re.Pattern[str]) -> None:
    """Raises ChatError where a template builds control tokens, as in '<|' + role + '|>': they get no mark."""
    try:
        rendered = marked.render(_PROBE)
    except ChatError:  # it is for other conversations than this one, which then tells nothing
        return
    if name := names.search(rendered):
        raise ChatError(f"the chat template puts {name[0]} together from pieces; write it there in one piece")


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it, which is as Hugging Face's transformers sets it up."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own would escape <, > and & for HTML.
        layout = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    def raise_exception(message: str) -> None:
        raise _Refusal(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
