"""A server as its users run it: a process on a free port. And what its streams are to be."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.server import raw
from tests.server.raw import CHAT, PATIENCE, Answer, Client

ROOT = Path(__file__).parents[2]
NAME = "llama3_1_8b_instruct"
KEY = "a-key-of-the-tests"
AUTHORIZED = f"Authorization: Bearer {KEY}"
COMPLETION = "/v1/completions"
PROJECT_CHAT = f"/project/p-7/genai/{NAME}{CHAT}?project_id=7"
HELLO = [{"role": "user", "content": "Hello"}]


class Server:
    """A server process from its start to its end. What it prints goes to files, so it never waits for us."""

    def __init__(self, *arguments: str, module: str = "server"):
        self._out, self._log = (tempfile.TemporaryFile("w+") for _ in range(2))
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments, "--port", "0"], cwd=ROOT, stdin=subprocess.DEVNULL,
            stdout=self._out, stderr=self._log, env={**os.environ, "LLAMA_API_KEY": ""})
        self.wait_for(lambda: "\nready: " in self.printed)
        self.url = re.match(r"llama \S+ at (http://127\.0\.0\.1:\d+) loads ", self.printed)[1]
        self.port = int(self.url.rpartition(":")[2])

    @property
    def printed(self) -> str:
        """Its standard output so far."""
        return _read(self._out)

    @property
    def log(self) -> str:
        """Its standard error so far."""
        return _read(self._log)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Look again and again until something is so; the server must not end meanwhile."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"the server has ended: {self.log}"
            assert time.monotonic() < deadline, f"waited in vain: {self.log}"
            time.sleep(0.01)

    def open(self, *requests: bytes) -> Client:
        """A connection on which these have been sent."""
        return Client(self.port).send(*requests)

    def get(self, path: str) -> Answer:
        """The answer to a GET."""
        with self.open(raw.get(path, AUTHORIZED)) as client:
            return client.answer()

    def post(self, path: str, body: Any, authorization: str = AUTHORIZED) -> Answer:
        """The answer to a POST, to its end. The body: bytes, or what is to be JSON."""
        with self.open(raw.post(path, body, authorization)) as client:
            return client.answer()

    def metric(self, name: str, labels: str = "") -> int:
        """The value of one of its metrics, the one with these labels; 0 if there is none yet."""
        pattern = rf"^llama:{name}{{[^}}]*{re.escape(labels)}[^}}]*}} (\S+)$"
        found = re.search(pattern, self.get("/metrics").body.decode(), re.MULTILINE)
        return 0 if found is None else int(float(found[1]))

    def engine_pid(self) -> int:
        """The engine's process: the only child, once there is one."""
        self.wait_for(lambda: bool(self._children()))
        [pid] = self._children()
        return pid

    def _children(self) -> list[int]:
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(pid) for task in tasks for pid in task.read_text().split()]

    def memory(self, name: str) -> int:
        """Bytes of the front process by their name in /proc/PID/status: VmRSS now, VmHWM at most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"^{name}:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        """End it, if it has not ended, without waiting for what still runs."""
        if self.process.poll() is None:
            self.process.kill()  # the engine ends with it
            self.process.wait()


def _read(file: Any) -> str:
    return os.pread(file.fileno(), 1 << 24, 0).decode()  # leaves the position, which is the writer's too


@contextmanager
def serving(*arguments: str, module: str = "server") -> Iterator[Server]:
    """A server for as long as the context lasts."""
    server = Server(*arguments, module=module)
    try:
        yield server
    finally:
        server.close()


@pytest.fixture(scope="session")
def demo() -> Iterator[Server]:
    """The server with the demo model, for everybody who has KEY."""
    with serving("--api-key", KEY) as server:
        yield server


# ---- streams --------------------------------------------------------------------------------------------


class Received(Client):
    """Reads answers from bytes that somebody else has received."""

    def __init__(self, received: bytes):
        self.received = bytearray(received)

    def _receive(self) -> bool:
        return False


def wait_for_texts(client: Client, count: int) -> None:
    """Receive so many chunks of a chat's text, and leave them to be read."""
    while client.received.count(b'"content":') < count:
        assert client._receive(), f"it ended with {bytes(client.received)!r}"


def outcome(answer: Answer) -> str:
    """How a stream ended: "whole", or "error" with exactly one error, its last event. Anything else fails."""
    assert answer.status == 200
    *chunks, last = answer.events
    assert all("choices" in json.loads(chunk) for chunk in chunks)
    if answer.is_whole:
        assert last == b"[DONE]"
        return "whole"
    assert list(json.loads(last)["error"]) == ["message", "type", "param", "code"]
    return "error"


def texts(answer: Answer, index: int = 0) -> list[str]:
    """Of a stream's chunks for one choice, of a chat or a completion, but for empty ones."""
    choices = [choice for event in answer.events if event != b"[DONE]"
               for choice in json.loads(event).get("choices", []) if choice["index"] == index]
    found = [choice["delta"].get("content") if "delta" in choice else choice["text"] for choice in choices]
    return [text for text in found if text]


def contents(chunks: Iterable[Any]) -> str:
    """The texts of some of the openai package's chunks, joined."""
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
