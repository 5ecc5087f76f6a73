"""`llama chat`: a conversation in the terminal, or the answer to one question."""

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from llama.commands import CommandError, UsageError
from llama.commands.loading import load, sampling_params
from llama.commands.reply import Reply
from llama.commands.tools import MAX_ROUNDS, Tools
from llama.completion import Delta
from llama.engine.request import RequestError, SamplingParams
from llama.terminal import InterruptFlag, is_terminal, note, read_line, read_stdin
from llama.text.messages import ChatError
from llama.text.tools import ToolCall, ToolCallStream

if TYPE_CHECKING:
    from llama.runtime import Llama

_HELP = """\
/system TEXT   set the system message; without TEXT, remove it
/reset         forget the conversation, but not the system message
/help          this list
/exit          leave; so does Ctrl-D, or Ctrl-C twice
Ctrl-C stops a reply. What had come of it stays in the conversation."""


def run(args: argparse.Namespace) -> int:
    """Answer the question and what is piped in, or whatever is typed until somebody leaves."""
    params = sampling_params(args)
    in_turns = args.text is None and is_terminal(sys.stdin)
    question = "" if in_turns else _question(args.text)
    tools = _tools(args)
    llm = load(args)
    if llm.template is None:
        raise CommandError(f"{llm.directory} has no chat template; use `llama generate` to continue a text")
    conversation = Conversation(llm, params, args.system, tools)
    if in_turns:
        converse(conversation, args.stats)
    else:
        _take_turn(conversation, question, args.stats, nullcontext())
    return 0


def _tools(args: argparse.Namespace) -> Tools | None:
    """The functions that the model may call. Raises CommandError, UsageError."""
    if args.tools is None:
        if args.yes:
            raise UsageError("--yes is for --tools: it lets calls run without asking")
        return None
    if not args.yes and not is_terminal(sys.stdin):
        raise CommandError("--tools asks before it runs a call, and nobody sits at stdin; --yes runs them unasked")
    return Tools.from_file(args.tools, asks=not args.yes)


def _question(text: str | None) -> str:
    """What is asked, followed by what is piped in."""
    piped = "" if is_terminal(sys.stdin) else read_stdin()
    question = "\n\n".join(part for part in (text, piped) if part)
    if not question.strip():
        raise CommandError("there is no question: give one, or pipe one in")
    return question


class Conversation:
    """The messages so far, and whom they are sent to. `system`: the message that precedes them, if any. `tools`: what
    the model may call; `calls`: what it called in its last reply."""

    def __init__(self, llm: "Llama", params: SamplingParams, system: str | None = None, tools: Tools | None = None):
        self.llm = llm
        self.params = params
        self.system = system
        self.tools = tools
        self.calls: list[ToolCall] = []
        self.messages: list[dict[str, Any]] = []

    def ask(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Reply:
        """Show the reply and remember both, the reply as far as it came; if nothing came of it, neither.

        Raises RequestError if the conversation no longer fits the context, ChatError if the template refuses.
        """
        return self._send([*self.messages, {"role": "user", "content": text}], stopped)

    def go_on(self, stopped: Callable[[], bool] = lambda: False) -> Reply:
        """The same, for what the model makes of the results of its calls."""
        return self._send(self.messages, stopped)

    def answer_calls(self) -> bool:
        """Have the calls of the last reply run, and remember their results. False if somebody stopped that."""
        goes_on, calls = True, list(enumerate(self.calls))
        self.calls = []
        for number, call in calls:
            try:
                result = self.tools.answer(call) if goes_on else "The user stopped this call."
            except KeyboardInterrupt:
                goes_on, result = False, "The user stopped this call."
            self.messages.append({"role": "tool", "tool_call_id": f"call_{number}", "content": result})
        return goes_on

    def _send(self, messages: list[dict[str, Any]], stopped: Callable[[], bool]) -> Reply:
        system = [{"role": "system", "content": self.system}] if self.system else []
        options = {} if self.tools is None else {"tools": self.tools.definitions}
        ids = self.llm.encode_chat([*system, *messages], **options)
        reply = Reply(len(ids), self.params)
        try:
            reply.receive(self._stream(ids), shown=True, stopped=stopped)
        finally:
            if reply.num_tokens:
                calls = [{"id": f"call_{number}", "function": {"name": call.name, "arguments": call.arguments}}
                         for number, call in enumerate(self.calls)]
                answer = {"role": "assistant", "content": reply.text} | ({"tool_calls": calls} if calls else {})
                self.messages = [*messages, answer]
        return reply

    def _stream(self, ids: list[int]) -> Generator[Delta, None, None]:
        try:
            yield from self._read(self.llm.stream(ids, self.params))
        except RequestError as error:
            if error.field != "max_tokens":
                raise
            # The context ends before max_tokens are generated: then that is where the reply ends.
            yield from self._read(self.llm.stream(ids, replace(self.params, max_tokens=None)))

    def _read(self, deltas: Iterable[Delta]) -> Generator[Delta, None, None]:
        """The deltas without the calls, which are kept."""
        self.calls = []
        if self.tools is None:
            yield from deltas
            return
        stream = ToolCallStream(self.llm.tokenizer, self.tools.names)
        for delta in deltas:
            found = stream.push(delta.text, delta.ids)
            if delta.finish_reason is not None:
                found += stream.finish(is_cut=delta.finish_reason != "stop" or isinstance(delta.stop_reason, str))
            self.calls += [each for each in found if isinstance(each, ToolCall)]
            yield replace(delta, text="".join(each for each in found if isinstance(each, str)))


def converse(conversation: Conversation, with_stats: bool) -> None:
    """Read what is typed and answer it, until /exit, Ctrl-D, or Ctrl-C twice."""
    if importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # from here on input() has editing and history
    llm = conversation.llm
    dtype = str(llm.model.dtype).removeprefix("torch.")
    note(f"{llm.directory.name}: {llm.config.num_parameters:,} parameters, {dtype}. /help lists the "
         "commands, Ctrl-D leaves.")
    leaving = False
    while True:
        try:
            line = read_line("> ").strip()
        except EOFError:
            note("")
            return
        except KeyboardInterrupt:
            note("" if leaving else "\nCtrl-C again or Ctrl-D leaves")
            if leaving:
                return
            leaving = True
            continue
        leaving = False
        if re.fullmatch(r"/[a-z]+(\s.*)?", line, re.DOTALL):
            if line == "/exit":
                return
            _obey(conversation, line)
        elif line:
            _answer(conversation, line, with_stats)


def _obey(conversation: Conversation, line: str) -> None:
    """Carry out a command."""
    command, _, text = line.partition(" ")
    if command == "/system":
        conversation.system = text.strip() or None
        note("system message set" if conversation.system else "no system message")
    elif line == "/reset":
        conversation.messages = []
        note("the conversation begins anew")
    elif line == "/help":
        note(_HELP)
    else:
        note(f"{line.split()[0]} is no command as it stands; /help lists them")


def _answer(conversation: Conversation, text: str, with_stats: bool) -> None:
    """One turn, after which the conversation can go on, whatever became of it."""
    try:
        _take_turn(conversation, text, with_stats, InterruptFlag())
    except KeyboardInterrupt:  # the second Ctrl-C
        note("stopped")
    except RequestError as error:
        note(f"llama: {error}, or forget the conversation with /reset")
    except ChatError as error:
        note(f"llama: {error}; /reset begins anew")


def _take_turn(conversation: Conversation, text: str, with_stats: bool,
               interrupt: AbstractContextManager[InterruptFlag | None]) -> None:
    """A question and its reply; or its replies, as long as they call tools. interrupt: what may stop a reply."""
    send = partial(conversation.ask, text)
    for _ in range(MAX_ROUNDS):
        with interrupt as flag:
            reply = send(stopped=lambda: flag is not None and flag.raised)
        _show(reply, conversation, with_stats)
        if reply.finish_reason is None or not conversation.calls:
            return
        if not conversation.answer_calls():
            note("stopped")
            return
        send = conversation.go_on
    note(f"stopped: after {MAX_ROUNDS} rounds of calls there is no answer")


def _show(reply: Reply, conversation: Conversation, with_stats: bool) -> None:
    """What there is to say about a reply, besides itself."""
    if reply.finish_reason is None:
        note("stopped" if reply.num_tokens else "stopped before the reply began; your message is not kept")
    elif reply.finish_reason == "length" and reply.num_tokens == conversation.params.max_tokens:
        note(f"cut off at --max-tokens {reply.num_tokens}")
    elif reply.finish_reason == "length":
        note(f"cut off: the context of {reply.num_prompt_tokens + reply.num_tokens} tokens is full; forget "
             "the conversation with /reset")
    if with_stats:
        reply.show_stats()
