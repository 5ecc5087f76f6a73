"""What is shown where, and in what form."""

import io
import os
import signal

import pytest

from llama import terminal


class Screen(io.StringIO):
    """A stream at whose end somebody sits."""

    def isatty(self):
        return True


@pytest.mark.parametrize("stream, shown", [(Screen, "a\tb\n\ufffd[2J\ufffd\ufffdé"),
                                           (io.StringIO, "a\tb\n\x1b[2J\x07\x9bé")])
def test_a_terminal_is_not_told_what_to_do_by_the_model(monkeypatch, stream, shown):
    monkeypatch.setattr("sys.stdout", stream())
    terminal.write_reply("a\tb\n\x1b[2J\x07\x9bé")
    terminal.write_reply("")
    assert terminal.sys.stdout.getvalue() == shown


@pytest.mark.parametrize("stream, environment, shown", [
    (Screen, {}, "\x1b[2mnote\x1b[0m\n"), (Screen, {"NO_COLOR": "1"}, "note\n"),
    (Screen, {"TERM": "dumb"}, "note\n"), (io.StringIO, {}, "note\n")])
def test_notes_are_dim_only_where_somebody_sees_it(monkeypatch, stream, environment, shown):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.stderr", stream())
    terminal.note("note")
    assert terminal.sys.stderr.getvalue() == shown


def test_the_prompt_never_goes_into_a_file(monkeypatch):
    monkeypatch.setattr("sys.stdin", Screen("héllo\n"))
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr("sys.stderr", Screen())
    assert terminal.read_line("> ") == "héllo"
    with pytest.raises(EOFError):
        terminal.read_line("> ")
    assert (terminal.sys.stdout.getvalue(), terminal.sys.stderr.getvalue()) == ("", "> > ")


def test_a_closed_stdin_is_an_empty_one(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert terminal.read_stdin() == ""
    assert not terminal.is_terminal(None)


def test_the_first_ctrl_c_is_a_flag_the_second_an_exception_and_afterwards_all_is_as_before():
    before = signal.getsignal(signal.SIGINT)
    with terminal.InterruptFlag() as interrupt:
        assert not interrupt.raised
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.raised
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
