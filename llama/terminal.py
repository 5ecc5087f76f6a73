"""The terminal: replies on stdout, all else on stderr; and what differs where one is a pipe or a file."""

import io
import os
import signal
import sys
from types import FrameType
from typing import Any, TextIO

# What a terminal would obey instead of showing: C0 without tab and newline, DEL, C1.
_CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)], "\N{REPLACEMENT CHARACTER}")


def prepare_streams() -> None:
    """Let no character be an error: pipes and files are UTF-8, and what a stream cannot hold is replaced.

    Bytes on stdin that are not UTF-8 become lone surrogates, which the tokenizer reads as U+FFFD.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"), (sys.stderr, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=stream.encoding if stream.isatty() else "utf-8", errors=errors)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody sits there. A closed stdin is None."""
    return stream is not None and stream.isatty()


def write_reply(text: str) -> None:
    """Text of the model on stdout, at once; on a terminal without its control characters."""
    if text:
        sys.stdout.write(text.translate(_CONTROLS) if is_terminal(sys.stdout) else text)
        sys.stdout.flush()


def note(text: str) -> None:
    """A line beside the reply, on stderr; dim where that is a terminal, unless NO_COLOR says otherwise."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not is_terminal(sys.stderr)
    sys.stderr.write(f"{text}\n" if plain or not text else f"\x1b[2m{text}\x1b[0m\n")
    sys.stderr.flush()


def read_line(prompt: str) -> str:
    """A line that somebody types, with editing where both ends are a terminal. Raises EOFError at Ctrl-D."""
    if is_terminal(sys.stdin) and is_terminal(sys.stdout):
        return input(prompt)
    sys.stderr.write(prompt)  # not input(): it would write the prompt into whatever stdout is
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def read_stdin() -> str:
    """All of stdin, without the line end that closes a text file; "" where it is closed."""
    return "" if sys.stdin is None else sys.stdin.read().removesuffix("\n")


class InterruptFlag:
    """While the context lasts, Ctrl-C only sets `raised`, so that the engine is never cut off within a step.

    A second Ctrl-C raises KeyboardInterrupt at once.
    """

    def __init__(self) -> None:
        self.raised = False

    def __enter__(self) -> "InterruptFlag":
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: Any) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.raised:
            raise KeyboardInterrupt
        self.raised = True
