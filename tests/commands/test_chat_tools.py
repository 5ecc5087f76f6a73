"""`llama chat --tools FILE.py` on the demo model: its calls are shown, asked about, run, and answered from."""

import pytest

from llama.commands import tools
from llama.commands.chat import Conversation
from llama.engine.request import SamplingParams
from llama.text.tools import ToolCall
from tests.commands.terminals import Terminal

ASK = "What is the weather in Zurich?"
CALL = "get_weather(city='Zurich')"
SOURCE = '''
import time
from pathlib import Path

def get_weather(city: str) -> str:
    """Get the weather for a city"""
    return _answer(city)

def _answer(city):
    with open(__file__ + ".calls", "a") as calls:
        calls.write(city + "\\n")
    return BODY
'''


@pytest.fixture
def file(tmp_path):
    """Writes the file of functions; the rest of its last function is given."""
    def write(body='f"12 degrees"'):
        (tmp_path / "weather.py").write_text(SOURCE.replace("return BODY", f"return {body}"))
        return tmp_path / "weather.py"

    return write


def calls_of(file):
    calls = file.with_name("weather.py.calls")
    return calls.read_text().split() if calls.exists() else []


def test_a_call_is_run_and_the_answer_uses_its_result(llama, file):
    ran = llama("chat", ASK, "--tools", file(), "--yes", "--greedy", stdin="")
    assert (ran.code, ran.err) == (0, f"{CALL}\n= 12 degrees\n")
    assert ran.out.strip() and "12 degrees" in ran.out and "{" not in ran.out
    assert calls_of(file()) == ["Zurich"]


def test_what_a_function_raises_is_its_result(llama, file):
    ran = llama("chat", ASK, "--tools", file("1 / 0"), "--yes", "--greedy", stdin="")
    assert (ran.code, ran.err) == (0, f"{CALL}\n= ZeroDivisionError: division by zero\n")


def test_no_call_is_run_that_nobody_can_be_asked_about(llama, file):
    ran = llama("chat", ASK, "--tools", file(), stdin="")
    assert ran.code == 1 and "--tools asks before it runs a call" in ran.err and calls_of(file()) == []


@pytest.mark.parametrize(("body", "message"), [
    ("x = 1\n", "defines no function whose name does not begin with _"),
    ("def f(x):\n    pass\n", "f: the parameter x has no annotation; write its type"),
    ("1 / 0\n", "cannot be run: ZeroDivisionError: division by zero"), ("def f(:\n", "cannot be run: SyntaxError"),
    (None, "there is no file")])
def test_a_file_that_holds_no_tools_says_why(llama, tmp_path, body, message):
    if body is not None:
        (tmp_path / "f.py").write_text(body)
    ran = llama("chat", ASK, "--tools", tmp_path / "f.py", "--yes", stdin="")
    assert ran.code == 1 and ran.err.startswith("llama: error: --tools: ") and message in ran.err


def test_yes_is_only_for_tools(llama):
    ran = llama("chat", ASK, "--yes", stdin="")
    assert ran.code == 2 and "--yes is for --tools" in ran.err


def test_in_a_terminal_each_call_is_asked_about(file):
    with Terminal("chat", "--tools", file("time.sleep(30)"), "--greedy", NO_COLOR="1") as terminal:
        terminal.read_until("> ")
        terminal.type(f"{ASK}\n")
        terminal.read_until(f"{CALL}\r\nrun it? [y/N] ")
        terminal.type("n\n")
        assert "degrees" not in terminal.read_until("> ") and calls_of(file("time.sleep(30)")) == []
        terminal.type(f"/reset\n{ASK}\n")
        terminal.read_until("run it? [y/N] ")
        terminal.press_ctrl_c("stopped")
        terminal.type(f"/reset\n{ASK}\n")
        terminal.read_until("run it? [y/N] ")
        terminal.type("y\n")
        while not calls_of(file("time.sleep(30)")):
            pass
        terminal.press_ctrl_c("stopped")  # in the middle of the function
        terminal.type("/exit\n")
        assert terminal.leave()[0] == 0


def test_calls_after_one_that_was_stopped_are_not_run():
    conversation = Conversation(None, SamplingParams(temperature=0), tools=tools.Tools({}, asks=False))
    conversation.calls = [ToolCall("f", "{}"), ToolCall("g", "{}")]
    asked = []

    def stop(call):
        asked.append(call.name)
        raise KeyboardInterrupt

    conversation.tools.answer = stop
    assert not conversation.answer_calls() and conversation.calls == [] and asked == ["f"]
    assert [message["content"] for message in conversation.messages] == ["The user stopped this call."] * 2
