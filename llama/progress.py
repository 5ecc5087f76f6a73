"""A progress bar for a terminal."""

import sys
import time
from collections.abc import Callable
from typing import Any


class ProgressBar:
    """One line on stderr, drawn again as `add` counts towards `total`; nothing at all unless `shown`.

    shown: by default, whether stderr is a terminal. describe: what follows the bar, from (done, total, seconds).
    """

    def __init__(self, what: str, total: int, describe: Callable[[int, int, float], str], done: int = 0,
                 shown: bool | None = None):
        self.what = what
        self.total = total
        self.done = done
        self._describe = describe
        self._shown = sys.stderr.isatty() if shown is None else shown
        self._began = time.perf_counter()
        self._line = ""

    def add(self, amount: int) -> None:
        """Count so much more as done."""
        self.done += amount
        if not self._shown:
            return
        bar = "#" * (25 * self.done // max(self.total, 1))
        text = self._describe(self.done, self.total, time.perf_counter() - self._began)
        line = f"\r{self.what} [{bar:25}] {text}\x1b[K"
        if line != self._line:
            self._line = line
            sys.stderr.write(line)
            sys.stderr.flush()

    def __enter__(self) -> "ProgressBar":
        self.add(0)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._shown:
            sys.stderr.write("\n")


def describe_bytes(done: int, total: int, seconds: float) -> str:
    """What follows a bar that counts bytes: how many of how many, and how fast."""
    unit, size = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
    return f"{done / size:.1f} of {total / size:.1f} {unit}, {done / max(seconds, 1e-9) / 1e9:.1f} GB/s"
