"""What the front and the engine's process say to each other over their pipe. Free of torch.

    down   ("submit", Request, ...)                ("cancel", request id, sample or None)
    up     ("ready", Loaded)                       the model is loaded
           ("events", list of Event, seconds)      at most one a step; how long it took
           ("beat", seconds, cache usage)          every BEAT_SECONDS: how long the step has been going on
           ("failed", sentence)                    the last word of an engine that cannot go on

A message is one pickle: both ends are processes of ours, and nobody else holds the pipe. Whichever finds it
closed knows that the other is gone.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

BEAT_SECONDS = 0.5


@dataclass(frozen=True)
class EngineSpec:
    """What the engine's process loads, and how much patience the front has with it.

    model: a directory or a hub id; None is the demo.
    options: further keywords of `llama.runtime.Llama.load`.
    threads: of torch; None leaves it to torch.
    factory: "module:function" that makes of this spec, in the engine's process, an engine (see
        `server.worker.Engine`) and its Loaded.
    max_queued_requests, max_queued_tokens: what may wait to be started.
    silent_seconds: a loaded engine from which nothing has come for so long is lost.
    step_seconds: so is one that is busy with one step for so long.
    max_failures: after so many engines in a row that end before they have brought a token, none is started.
    retry_seconds: the pause after the first of these; it doubles.
    """

    model: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None
    factory: str = "server.worker:load"
    max_queued_requests: int = 1024
    max_queued_tokens: int = 4_000_000
    silent_seconds: float = 10.0
    step_seconds: float = 600.0
    max_failures: int = 5
    retry_seconds: float = 0.5


@dataclass(frozen=True)
class Loaded:
    """What came of loading.

    max_context: positions that one sequence can take, in the model and in the cache. max_running: sequences
    in one step. details: what else is worth telling people, plain values by name.
    """

    max_context: int
    max_running: int
    details: Mapping[str, Any] = field(default_factory=dict)


def send(connection: Connection, message: tuple) -> None:
    """Write one message; only one thread may at a time. Raises OSError if nobody is there to read it."""
    connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> tuple:
    """Wait for a message. Raises EOFError or OSError if none will come."""
    return pickle.loads(connection.recv_bytes())
