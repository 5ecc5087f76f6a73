"""The command in a terminal of its own, as somebody who types would have it."""

import fcntl
import os
import pty
import select
import subprocess
import sys
import termios
import time


class Terminal:
    """`llama` with its streams on a pseudo-terminal that is its controlling one: Ctrl-C is a real signal."""

    def __init__(self, *args, **environment):
        self._here, there = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "llama", *map(str, args)], stdin=there, stdout=there, stderr=there,
            env=environment, start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(there)
        self._unread = b""

    def type(self, text):
        """Press keys; "\x03" is Ctrl-C, "\x04" Ctrl-D."""
        os.write(self._here, text.encode())

    def read_until(self, text, seconds=30):
        """What is shown up to and with `text`. Fails with what was shown instead."""
        end, wanted = time.monotonic() + seconds, text.encode()
        while wanted not in self._unread:
            assert time.monotonic() < end and self._receive(), f"no {text!r} in {self._unread!r}"
        shown, _, self._unread = self._unread.partition(wanted)
        return (shown + wanted).decode()

    def press_ctrl_c(self, text=None):
        """Interrupt the prompt until `text` is shown or the program has left.

        Once may not do: readline looks at a signal that comes between two keys only after the next one.
        """
        for _ in range(10):
            self.type("\x03")
            end = time.monotonic() + 3
            while time.monotonic() < end:
                if not self._receive():
                    return self.leave()
                if text is not None and text.encode() in self._unread:
                    return self.read_until(text)
        raise AssertionError(f"no {text!r} in {self._unread!r}")

    def leave(self, seconds=30):
        """Wait for the end; returns the exit code and what was still shown."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self._receive():
            pass
        return self.process.wait(20), self._unread.decode()

    def _receive(self):
        """More of the output; False at its end."""
        if not select.select([self._here], [], [], 0.1)[0]:
            return True
        try:
            piece = os.read(self._here, 65536)
        except OSError:  # how Linux says that the other end is closed
            return False
        self._unread += piece
        return bool(piece)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()
        os.close(self._here)
