"""A load of conversations, and three ways to the engine that answers it."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from llama.engine.engine import Engine
from llama.engine.request import Event, Request, SamplingParams, TokenEvent
from server.supervisor import Lost, Supervisor
from server.wire import EngineSpec
from server.worker import load as load_engine

PATIENCE = 600  # seconds for a model to load


@dataclass(frozen=True)
class Ask:
    """A conversation, its prompt's ids, and how many tokens are to answer it."""

    messages: list[dict[str, str]]
    ids: tuple[int, ...]
    num_tokens: int

    @property
    def params(self) -> SamplingParams:
        """Greedy, exactly so many tokens."""
        return SamplingParams(max_tokens=self.num_tokens, temperature=0.0, top_p=1.0, top_k=-1,
                              repetition_penalty=1.0, ignore_eos=True)

    @property
    def body(self) -> bytes:
        """The same for the server."""
        return json.dumps({"messages": self.messages, "max_tokens": self.num_tokens, "temperature": 0,
                           "ignore_eos": True, "skip_special_tokens": False, "stream": True}).encode()


@dataclass(frozen=True)
class Load:
    """Asks that are taken up one after another. due: when, in seconds from the beginning, however many are
    under way; None: as soon as fewer than `together` are."""

    asks: Sequence[Ask]
    together: int
    due: Sequence[float] | None = None


@dataclass
class Record:
    """What became of an ask, in seconds from the load's beginning. came: when each piece of its text did;
    from the engine, each token. error: why it has no end."""

    due: float
    came: list[float] = field(default_factory=list)
    error: str | None = None


class Way(Protocol):
    """Something that answers a load."""

    def run(self, load: Load) -> list[Record]:
        """All of it, to its end; the records in the order of the asks."""

    def close(self) -> None:
        """Free what it holds."""


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._began


def note(record: Record, events: Sequence[Event | Lost], now: float) -> bool:
    """Enter events of one request; whether it has ended."""
    for event in events:
        if isinstance(event, Lost):
            record.error = event.message
            return True
        if isinstance(event, TokenEvent):
            record.error = event.error
            if event.token_id is not None:
                record.came.append(now)
            if event.finish_reason is not None:
                return True
    return False


class OnEngine:
    """The engine in this process: one thread that submits what is due, and steps."""

    def __init__(self, spec: EngineSpec):
        self._engine: Engine = load_engine(spec)[0]

    def run(self, load: Load) -> list[Record]:
        engine, clock = self._engine, Clock()
        records: list[Record] = []
        num_open = 0
        while len(records) < len(load.asks) or engine.has_work:
            while len(records) < len(load.asks):
                due = clock() if load.due is None else load.due[len(records)]
                if num_open >= load.together if load.due is None else due > clock():
                    break
                ask = load.asks[len(records)]
                engine.submit(Request(str(len(records)), ask.ids, ask.params))
                records.append(Record(due))
                num_open += 1
            if not engine.has_work:
                time.sleep(max(load.due[len(records)] - clock(), 0))
                continue
            events = engine.step()
            now = clock()
            num_open -= sum(note(records[int(event.request_id)], [event], now) for event in events)
        return records

    def close(self) -> None:
        pass


class OverPipe:
    """The engine in a process of its own: a thread for each ask under way, as in the server's front."""

    def __init__(self, spec: EngineSpec):
        self._supervisor = Supervisor(spec)
        self._supervisor.start()
        deadline = time.monotonic() + PATIENCE
        while self._supervisor.state != "ready":
            if self._supervisor.state == "failed" or time.monotonic() > deadline:
                raise RuntimeError(f"the engine did not start: {self._supervisor.state_detail}")
            time.sleep(0.05)
        self._num_runs = 0

    def run(self, load: Load) -> list[Record]:
        self._num_runs += 1
        records = [Record(0.0) for _ in load.asks]
        upcoming = iter(range(len(load.asks)))
        clock = Clock()

        def work() -> None:
            for index in upcoming:
                record, ask = records[index], load.asks[index]
                record.due = _due(load, index, clock)
                time.sleep(max(record.due - clock(), 0))
                ticket = self._supervisor.submit([Request(f"{self._num_runs}-{index}", ask.ids, ask.params)])
                while events := ticket.get():
                    note(record, events, clock())

        threads = [threading.Thread(target=work) for _ in range(_num_workers(load))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return records

    def close(self) -> None:
        self._supervisor.stop(0)


class OverHttp:
    """`python -m server`, and a client with a pool of connections in one thread of this process."""

    def __init__(self, flags: Sequence[str]):
        self._process = subprocess.Popen([sys.executable, "-m", "server", "--port", "0", *flags],
                                         stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        lines = iter(self._process.stdout.readline, "")
        self._port = int(re.search(r"http://127\.0\.0\.1:(\d+)", next(lines))[1])
        if not any(line.startswith("ready: ") for line in lines):
            raise RuntimeError("the server did not start")
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    def run(self, load: Load) -> list[Record]:
        return asyncio.run(self._run(load))

    async def _run(self, load: Load) -> list[Record]:
        records = [Record(0.0) for _ in load.asks]
        upcoming = iter(range(len(load.asks)))
        clock = Clock()

        async def work() -> None:
            for index in upcoming:
                records[index].due = _due(load, index, clock)
                await asyncio.sleep(max(records[index].due - clock(), 0))
                await self._answer(load.asks[index].body, records[index], clock)

        await asyncio.gather(*(work() for _ in range(_num_workers(load))))
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()
        return records

    async def _answer(self, body: bytes, record: Record, clock: Callable[[], float]) -> None:
        reader, writer = connection = self._idle.pop() if self._idle else await asyncio.open_connection(
            "127.0.0.1", self._port)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                     b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            record.error = head.split(b"\r\n", 1)[0].decode()
            writer.close()
            return
        data = b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            data = await reader.readexactly(size + 2)
            num_texts = data.count(b'"delta":{"content":') - data.count(b'"delta":{"content":""')
            record.came += [clock()] * num_texts
        await reader.readexactly(2)
        if not data.endswith(b"data: [DONE]\n\n\r\n"):
            record.error = "the stream has no end"
        self._idle.append(connection)

    def cpu_seconds(self) -> float:
        """Processor time that the front, without the engine, has taken so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


def _num_workers(load: Load) -> int:
    return load.together if load.due is None else len(load.asks)


def _due(load: Load, index: int, clock: Callable[[], float]) -> float:
    return clock() if load.due is None else load.due[index]
