"""`llama chat`: conversations, in a terminal and not."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llama.commands import chat
from llama.completion import Delta
from llama.engine.request import RequestError, SamplingParams
from llama.runtime import Llama
from llama.text.messages import ChatError
from tests.commands.small import ALPHABET, make_checkpoint
from tests.commands.terminals import Terminal


@pytest.fixture
def asked(monkeypatch):
    """The conversations that were sent to the model."""
    seen, encode = [], Llama.encode_chat

    def spy(self, messages, **template):
        seen.append([(message["role"], message["content"]) for message in messages])
        return encode(self, messages, **template)

    monkeypatch.setattr(Llama, "encode_chat", spy)
    return seen


# ---- one question -----------------------------------------------------------------------------------


def test_one_question_is_answered_on_stdout_and_nothing_else_is(llama, checkpoint, asked):
    ran = llama("chat", "Hello", "--model", checkpoint)
    assert (ran.code, ran.out, ran.err) == (0, f"{ALPHABET}\n", "")
    assert asked == [[("user", "Hello")]]


def test_a_pipe_is_the_question(llama, checkpoint, asked):
    assert llama("chat", "--model", checkpoint, stdin="hi\n").out == f"{ALPHABET}\n"
    assert asked == [[("user", "hi")]]


def test_question_and_pipe_go_together(llama, checkpoint, asked):
    llama("chat", "Summarise:", "--model", checkpoint, stdin="line 1\nline 2\n")
    assert asked == [[("user", "Summarise:\n\nline 1\nline 2")]]


def test_an_empty_pipe_is_no_question(llama, checkpoint):
    ran = llama("chat", "--model", checkpoint, stdin="\n")
    assert (ran.code, ran.err) == (1, "llama: error: there is no question: give one, or pipe one in\n")


def test_a_system_message_comes_first(llama, checkpoint, asked):
    llama("chat", "Hello", "--system", "Be brief.", "--model", checkpoint)
    assert asked == [[("system", "Be brief."), ("user", "Hello")]]


def test_bytes_that_are_not_utf_8_are_read_and_utf_8_is_written_whatever_the_locale(checkpoint):
    ran = subprocess.run([sys.executable, "-m", "llama", "chat", "--model", checkpoint],
                         input=b"caf\xc3\xa9 \xff", capture_output=True,
                         env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (ran.returncode, ran.stdout) == (0, f"{ALPHABET}\n".encode()), ran.stderr


def test_without_a_template_generate_is_named(llama, tmp_path):
    make_checkpoint(tmp_path, template=False)
    ran = llama("chat", "Hello", "--model", tmp_path)
    assert (ran.code, ran.err) == (1, f"llama: error: {tmp_path} has no chat template; use `llama generate` "
                                      "to continue a text\n")


def test_a_reply_that_was_cut_off_says_where(llama, checkpoint, endless):
    ran = llama("chat", "Hello", "--model", checkpoint, "--max-tokens", 3)
    assert (ran.out, ran.err) == ("abc\n", "cut off at --max-tokens 3\n")
    ran = llama("chat", "Hello", "--model", endless, "--context", 200)
    assert ran.err == "cut off: the context of 200 tokens is full; forget the conversation with /reset\n"


def test_more_max_tokens_than_the_context_has_left_are_as_many_as_it_has(llama, endless):
    ran = llama("chat", "Hello", "--model", endless, "--context", 200, "--max-tokens", 199)
    assert "the context of 200 tokens is full" in ran.err


def test_stats_go_to_stderr(llama, checkpoint):
    ran = llama("chat", "Hello", "--model", checkpoint, "--stats")
    assert ran.out == f"{ALPHABET}\n"
    assert ran.err.startswith("prompt ") and "first token after 0." in ran.err
    assert "reply 29 tokens in" in ran.err and ran.err.endswith(" tokens/s\n")


# ---- in turns ---------------------------------------------------------------------------------------


class FakeLlama:
    """Answers "one two three", word by word. `errors` are raised instead, one a call of `stream`."""

    config = SimpleNamespace(num_parameters=1000)
    model = SimpleNamespace(dtype="torch.float32")
    directory = SimpleNamespace(name="fake")

    def __init__(self, *errors):
        self.errors = list(errors)
        self.asked = []
        self.params = []

    def encode_chat(self, messages):
        self.asked.append([message["content"] for message in messages])
        return [1, 2, 3]

    def stream(self, ids, params):
        self.params.append(params)
        if self.errors and (error := self.errors.pop(0)):
            raise error
        return (Delta(0, text, (7,), finish_reason=reason)
                for text, reason in (("one ", None), ("two ", None), ("three", "stop")))


@pytest.fixture
def converse(monkeypatch, capsys):
    """Types lines (an exception is Ctrl-C or Ctrl-D) at a fake model; Ctrl-D follows."""

    def run(llm, *lines, system=None, **params):
        typed = [*lines, EOFError]

        def read_line(prompt):
            line = typed.pop(0)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(chat, "read_line", read_line)
        conversation = chat.Conversation(llm, SamplingParams(**params), system)
        chat.converse(conversation, with_stats=False)
        return conversation, capsys.readouterr()

    return run


def test_every_turn_is_sent_with_those_before_it(converse):
    llm = FakeLlama()
    _, shown = converse(llm, "a", "", "  b  ", "c")
    assert llm.asked == [["a"], ["a", "one two three", "b"],
                         ["a", "one two three", "b", "one two three", "c"]]
    assert shown.out == "one two three\n" * 3
    assert shown.err == "fake: 1,000 parameters, float32. /help lists the commands, Ctrl-D leaves.\n\n"


def test_system_sets_the_message_and_removes_it(converse):
    llm = FakeLlama()
    _, shown = converse(llm, "/system Be brief.", "a", "/system", "b")
    assert llm.asked == [["Be brief.", "a"], ["a", "one two three", "b"]]
    assert "system message set\nno system message\n" in shown.err


def test_reset_forgets_the_conversation_but_not_the_system_message(converse):
    llm = FakeLlama()
    converse(llm, "a", "/reset", "b", system="Be brief.")
    assert llm.asked == [["Be brief.", "a"], ["Be brief.", "b"]]


def test_exit_leaves_and_help_lists(converse):
    llm = FakeLlama()
    _, shown = converse(llm, "/help", "/exit", "a")
    assert all(f"\n{command}" in shown.err for command in ("/system TEXT", "/reset", "/help", "/exit"))
    assert llm.asked == []


def test_what_is_no_command_says_so_unless_it_is_a_path(converse):
    llm = FakeLlama()
    _, shown = converse(llm, "/rest", "/reset now", "/usr/bin/env?")
    assert "/rest is no command as it stands; /help lists them\n/reset is no command as it" in shown.err
    assert llm.asked == [["/usr/bin/env?"]]


def test_ctrl_c_at_the_prompt_leaves_the_second_time_in_a_row(converse):
    llm = FakeLlama()
    converse(llm, KeyboardInterrupt, "a", KeyboardInterrupt, "/reset", KeyboardInterrupt, KeyboardInterrupt,
             "b")
    assert llm.asked == [["a"]]
    converse(llm, KeyboardInterrupt, "c", KeyboardInterrupt, "d")
    assert llm.asked == [["a"], ["c"], ["c", "one two three", "d"]]


def test_a_full_context_says_what_to_do_and_keeps_the_conversation(converse):
    llm = FakeLlama(None, RequestError("prompt", "the prompt is too long; shorten the prompt"))
    _, shown = converse(llm, "a", "b", "/reset", "c")
    assert ("llama: the prompt is too long; shorten the prompt, or forget the conversation with /reset\n"
            in shown.err)
    assert llm.asked == [["a"], ["a", "one two three", "b"], ["c"]]


def test_a_message_that_was_refused_is_not_kept(converse):
    llm = FakeLlama(ChatError("the chat template refused the conversation: no"))
    conversation, shown = converse(llm, "a", "b")
    assert "llama: the chat template refused the conversation: no; /reset begins anew\n" in shown.err
    assert llm.asked == [["a"], ["b"]]
    assert len(conversation.messages) == 2


def test_max_tokens_beyond_the_context_end_where_it_does(converse):
    llm = FakeLlama(RequestError("max_tokens", "too many"))
    _, shown = converse(llm, "a", max_tokens=100)
    assert [params.max_tokens for params in llm.params] == [100, None]
    assert shown.out == "one two three\n"


def test_a_stopped_reply_stays_as_far_as_it_came(capsys):
    llm = FakeLlama()
    conversation = chat.Conversation(llm, SamplingParams())
    answers = iter([False, True])
    reply = conversation.ask("a", stopped=lambda: next(answers))
    assert reply.finish_reason is None
    assert [message["content"] for message in conversation.messages] == ["a", "one two "]
    assert capsys.readouterr().out == "one two \n"


def test_a_reply_that_was_stopped_before_it_began_takes_its_question_along():
    llm = FakeLlama()
    llm.stream = lambda ids, params: (Delta(0, "", ()) for _ in range(3))
    conversation = chat.Conversation(llm, SamplingParams())
    conversation.ask("a", stopped=lambda: True)
    assert conversation.messages == []


# ---- in a terminal ----------------------------------------------------------------------------------


def test_ctrl_c_stops_a_reply_and_not_the_program(endless):
    with Terminal("chat", "--model", endless) as terminal:
        terminal.read_until("> ")
        terminal.type("hello\n")
        terminal.read_until("xyzéabc")
        terminal.type("\x03")
        terminal.read_until("\x1b[2mstopped\x1b[0m\r\n> ")
        terminal.type("again\n")
        terminal.read_until("xyzéabc")
        terminal.type("\x03")
        terminal.read_until("> ")
        terminal.type("half a lin")
        terminal.read_until("half a lin")
        terminal.press_ctrl_c("Ctrl-C again or Ctrl-D leaves\x1b[0m\r\n> ")
        assert terminal.press_ctrl_c()[0] == 0


def test_the_terminal_has_history_and_ctrl_d_leaves(checkpoint):
    with Terminal("chat", "--model", checkpoint, NO_COLOR="1") as terminal:
        terminal.read_until("Ctrl-D leaves.\r\n> ")  # not dim
        terminal.type("/system Bx\x7fe brief.\n")
        terminal.read_until("\nsystem message set\r\n> ")
        terminal.type("\x1b[A")  # up
        terminal.read_until("/system Be brief.")
        terminal.type("\n")
        terminal.read_until("\nsystem message set\r\n> ")
        terminal.type("héllo\n")
        assert terminal.read_until("\r\n> ").endswith(f"{ALPHABET}\r\n> ")
        terminal.type("\x04")
        assert terminal.leave()[0] == 0


def test_ctrl_c_stops_one_question_and_the_program(endless):
    with Terminal("chat", "hello", "--model", endless) as terminal:
        terminal.read_until("xyzéabc")
        terminal.type("\x03")
        code, rest = terminal.leave()
        assert code == 130
        assert "Traceback" not in rest


def test_the_demo_model_remembers_an_earlier_turn():
    with Terminal("chat", "--greedy") as terminal:
        terminal.read_until("> ")
        terminal.type("My name is Anna.\n")
        terminal.read_until("\r\n> ")
        terminal.type("What is my name?\n")
        terminal.read_until("Your name is Anna.")
