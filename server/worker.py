"""The engine's process: loads the model, then steps the engine for as long as the front is there.

    read   a thread: commands from the pipe, also in a long step; the front's end is this process's end
    beat   a thread: a sign of life, with how long the step has been going on
    main   obeys what has been read, makes a step, reports it: one message a step

Between two steps there is no waiting and no system call but the report's; without work, main sleeps until a
command comes. Signals that address everybody (Ctrl-C in a terminal, a service manager's SIGTERM) mean the
front, which decides what becomes of the work: this process ends when the front closes the pipe.
"""

import contextlib
import gc
import os
import pkgutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence as Ordered
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Protocol

from llama.checkpoint.ahead import read_ahead
from llama.checkpoint.pull import resolve
from llama.engine.request import Event, QueueFullError, Request, RequestError, TokenEvent
from llama.text.grammar import GrammarError
from server import isolate, wire
from server.wire import BEAT_SECONDS, EngineSpec, Loaded

# More than the front will ever let wait: it keeps the bounds itself, to refuse without asking.
UNBOUNDED = {"max_queued_requests": sys.maxsize, "max_queued_tokens": sys.maxsize}


class Engine(Protocol):
    """What can be driven here: `llama.engine.engine.Engine`, or a stand-in for it.

    cache_usage: the share of the KV cache that is held, 0 to 1.
    """

    has_work: bool
    cache_usage: float

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestError, QueueFullError."""

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        """Forget a request or one of its samples."""

    def step(self, only: frozenset[str] | None = None) -> list[Event]:
        """Compute one step, for these requests alone if `only` is given. May raise: see `server.isolate`."""

    def check(self) -> None:
        """Raise AssertionError unless the engine's books agree with each other."""


def load(spec: EngineSpec) -> tuple[Engine, Loaded]:
    """The engine of a checkpoint. Raises what `llama.runtime.Llama.load` does."""
    read_ahead(resolve(spec.model))
    import torch  # here, not above: the pipe is read and the heart beats while this takes its seconds

    from llama.runtime import Llama

    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    options = dict(spec.options)
    llm = Llama.load(spec.model, limits={**options.pop("limits", {}), **UNBOUNDED}, **options)
    with contextlib.suppress(GrammarError):  # without the extra, requests with grammars are refused
        llm.grammars.prepare()
    limits, pool = llm.engine.scheduler.limits, llm.engine.scheduler.pool
    room = pool.num_blocks * pool.block_size
    details = {"directory": str(llm.directory), "dtype": str(llm.model.dtype).removeprefix("torch."),
               "device": str(llm.model.device), "cache_tokens": room, "threads": torch.get_num_threads()}
    return llm.engine, Loaded(min(limits.max_context, room), limits.max_running, details)


class Worker:
    """One engine at one end of a pipe."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._sending = threading.Lock()
        self._commands: SimpleQueue[tuple] = SimpleQueue()
        self._open: dict[str, set[int]] = {}  # the samples that are to end yet, by request
        self._engine: Engine | None = None
        self._step_began: float | None = None

    def run(self, spec: EngineSpec) -> int:
        """Load and serve. Returns, with an exit status, only if there is no loading or no going on."""
        for target in (self._read, self._beat):
            threading.Thread(target=target, daemon=True).start()
        try:
            engine, loaded = pkgutil.resolve_name(spec.factory)(spec)
            self._engine = engine
            gc.collect()
            gc.freeze()  # what is loaded stays: no collection has to look through it in the middle of a step
            self._send(("ready", loaded))
            self._serve(engine)
        except Exception as error:
            if not isolate.is_ours(error):
                traceback.print_exc()
            self._send(("failed", isolate.sentence(error)))
        return 1

    def _serve(self, engine: Engine) -> None:
        while True:
            events = self._obey(engine)
            began = time.monotonic()
            if engine.has_work:
                self._step_began = began
                brought, culprits = isolate.step(engine)
                self._step_began = None
                self._close_ended(brought)
                events += brought
                for request_id, why in culprits.items():
                    events += self._errors(request_id, f"the model failed on this request: {why}")
            if events:
                self._send(("events", events, time.monotonic() - began))

    # ---- commands ----------------------------------------------------------------------------------------

    def _obey(self, engine: Engine) -> list[Event]:
        """Do what was commanded meanwhile; with nothing else to do, wait for it. The events are refusals."""
        events: list[Event] = []
        wait = not engine.has_work
        while wait or not self._commands.empty():
            command, *arguments = self._commands.get()
            if command == "submit":
                for request in arguments:
                    events += self._submit(engine, request)
            else:
                self._cancel(engine, *arguments)
            wait = False
        return events

    def _submit(self, engine: Engine, request: Request) -> list[Event]:
        self._open[request.id] = set(range(request.params.n))
        try:
            engine.submit(request)
        except (RequestError, QueueFullError) as error:
            return self._errors(request.id, str(error), getattr(error, "field", None))
        return []

    def _cancel(self, engine: Engine, request_id: str, index: int | None) -> None:
        engine.cancel(request_id, index)
        left = self._open.get(request_id, set())
        left.discard(index)
        if index is None or not left:
            self._open.pop(request_id, None)

    def _close_ended(self, events: Ordered[Event]) -> None:
        for event in events:
            if isinstance(event, TokenEvent) and event.finish_reason is not None:
                left = self._open.get(event.request_id, set())
                left.discard(event.index)
                if not left:
                    self._open.pop(event.request_id, None)

    def _errors(self, request_id: str, why: str, field: str | None = None) -> list[Event]:
        """The end of every sample of a request that has not ended yet. field: of the request, if it is to blame."""
        return [TokenEvent(request_id, index, None, finish_reason="error", error=why, field=field)
                for index in sorted(self._open.pop(request_id, ()))]

    # ---- the pipe ----------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            while True:
                self._commands.put(wire.receive(self._connection))
        except (EOFError, OSError):
            os._exit(0)  # whatever main is doing, nobody will ask for it

    def _beat(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            began = self._step_began
            usage = 0.0 if self._engine is None else self._engine.cache_usage
            self._send(("beat", 0.0 if began is None else time.monotonic() - began, usage))

    def _send(self, message: tuple) -> None:
        try:
            with self._sending:
                wire.send(self._connection, message)
        except OSError:
            os._exit(0)


def main(descriptor: int) -> int:
    """Serve the front that holds the other end of an inherited socket, whose first message is the EngineSpec.

    Returns the exit status.
    """
    for everybody in (signal.SIGINT, signal.SIGTERM):
        signal.signal(everybody, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)  # the pipe is to end with this process, not with its children
    connection = Connection(descriptor)
    try:
        [spec] = wire.receive(connection)
    except (EOFError, OSError):
        return 0
    return Worker(connection).run(spec)
