"""The front's end of one engine process: started, spoken to, ended, reaped. Knows nothing of what is said."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
from multiprocessing.connection import Pipe

from server import wire

_MAIN = "import sys; from server.worker import main; sys.exit(main(int(sys.argv[1])))"


class EngineProcess:
    """A child that runs `server.worker`, and the pipe to it. Any thread may send; one receives and ends.

    A process group of its own keeps a terminal's Ctrl-C away from it, also before it can say that it ignores
    it.
    """

    def __init__(self, spec: wire.EngineSpec):
        """Start it. Raises OSError if the system does not let."""
        self._connection, theirs = Pipe()
        self._poller = select.poll()
        self._poller.register(self._connection, select.POLLIN)
        self._sending = threading.Lock()
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _MAIN, str(theirs.fileno())], pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}, process_group=0)
        finally:
            theirs.close()
        self.send((spec,))

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def send(self, message: tuple) -> None:
        """Give it a message. If it is gone, that is for the receiving thread to find out."""
        with self._sending:
            with contextlib.suppress(OSError):
                wire.send(self._connection, message)

    def receive(self, seconds: float) -> tuple | None:
        """Its next message; None if there is none for so long. Raises EOFError or OSError once it is gone."""
        if not self._poller.poll(seconds * 1000):
            return None
        return wire.receive(self._connection)

    def kill(self) -> None:
        """End it, whatever it does. It has nothing to put in order."""
        self._process.kill()

    def end(self, patience: float) -> str:
        """Wait until it has ended, then kill it if it has not; leave no zombie. Says how it ended."""
        try:
            code = self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        with self._sending:  # nobody writes to a descriptor that may already be another's
            self._connection.close()
        if code == -signal.SIGKILL:
            return "it was killed by SIGKILL, as the system does when memory runs out"
        if code < 0:
            return f"it was ended by {signal.Signals(-code).name}"
        return f"it ended with exit status {code}"
