"""Keeps an engine running behind the front, whatever becomes of the process that it runs in. Free of torch.

One thread owns the process: it starts it, hands on what it reports, notices when it is gone, tells everybody
who waits for it, and starts the next. All else happens in the threads that ask.
"""

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence as Ordered
from typing import Any, Literal

from llama.engine.request import Request, TokenEvent
from server.process import EngineProcess
from server.tickets import Event, Lost, Ticket, Tickets
from server.wire import EngineSpec, Loaded

__all__ = ["EngineSpec", "EngineUnavailableError", "Event", "Lost", "State", "Supervisor", "Ticket"]

State = Literal["loading", "ready", "draining", "lost", "failed"]

MAX_RETRY_SECONDS = 30.0
_LOOK_SECONDS = 0.25  # how often a silence is thought about
_LAST_BREATH_SECONDS = 1.0  # from a closed pipe to the end of its process


class EngineUnavailableError(RuntimeError):
    """No engine takes requests now; `state` is why, the message is for people."""

    def __init__(self, state: State, message: str):
        super().__init__(message)
        self.state = state


class Supervisor:
    """One engine at a time, and everybody who asks it.

    state: loading, ready, draining (the server stops, and takes nothing new), lost (the engine is gone, and
    the next not yet started), failed (there will be none). state_detail: more of it, for people. on_state is
    called with both whenever they change, by the thread that changes them; it must not raise. loaded: what
    the engine is, since one was ready first.
    """

    def __init__(self, spec: EngineSpec, on_state: Callable[[State, str], None] | None = None):
        self.spec = spec
        self.state: State = "loading"
        self.state_detail = "the model is loading"
        self.loaded: Loaded | None = None
        self._on_state = on_state
        self._tickets = Tickets(spec)
        self._engine: EngineProcess | None = None
        self._cache_usage = 0.0
        self._num_engines = self._num_steps = 0
        self._heard = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._changing = threading.Lock()
        self._woken = threading.Event()
        self._drain_until = math.inf
        self._is_stopping = self._is_over = False

    def start(self) -> None:
        """Begin to load. Returns at once."""
        self._thread.start()

    def stop(self, drain_seconds: float) -> None:
        """Take nothing new, give what runs so long to end, then end the engine; who still waits gets a Lost.

        A second call can only shorten the patience of the first, and returns at once: it may come from a
        signal handler.
        """
        self._drain_until = min(self._drain_until, time.monotonic() + drain_seconds)
        if self._is_stopping:
            return
        self._is_stopping = True
        self._enter("draining", "the server is stopping")
        while len(self._tickets) and time.monotonic() < self._drain_until:
            time.sleep(0.02)
        self._is_over = True
        self._woken.set()
        engine = self._engine  # the other thread's, which may be done with it in this moment
        if engine is not None:
            engine.kill()
        if self._thread.is_alive():
            self._thread.join()

    def submit(self, requests: Ordered[Request]) -> Ticket:
        """Have all of these continued, or none. Their ids are nobody else's, their params complete.

        Raises EngineUnavailableError; RequestError for what can never be served, QueueFullError for what
        cannot now. What only the engine can refuse comes back as events with finish_reason "error".
        """
        ticket = None if self._is_stopping else self._tickets.submit(requests)
        if ticket is None:
            raise EngineUnavailableError(self.state, self.state_detail)
        return ticket

    @property
    def is_full(self) -> bool:
        """Whether `submit` would raise QueueFullError, whatever it is given."""
        return self._tickets.is_full

    def snapshot(self) -> dict[str, Any]:
        """How things stand: state, state_detail; engine_pid; heartbeat_age, seconds since it was last heard;
        running and waiting requests; cache_usage, 0 to 1; and counted from the beginning: num_engines
        started, num_steps, prompt_tokens, cached_tokens (those of them that the prefix cache had),
        generated_tokens."""
        engine = self._engine
        return {"state": self.state, "state_detail": self.state_detail,
                "engine_pid": None if engine is None else engine.pid,
                "heartbeat_age": time.monotonic() - self._heard, "cache_usage": self._cache_usage,
                "num_engines": self._num_engines, "num_steps": self._num_steps, **self._tickets.counts()}

    # ---- the thread that owns the process ----------------------------------------------------------------

    def _run(self) -> None:
        failures, how = 0, "the model is loading"
        try:
            while not self._is_stopping:
                self._enter("loading", how)
                was_useful, is_final, why = self._run_engine()
                failures = 0 if was_useful else failures + 1
                if is_final:
                    how = why
                elif failures >= self.spec.max_failures:
                    how, is_final = f"the engine failed {failures} times in a row, at last so: {why}", True
                else:
                    how = f"the engine was lost ({why}) and is being started again"
                self._enter("failed" if is_final else "lost", how)
                self._tickets.lose("the server is stopping" if self._is_stopping else how)
                if is_final:
                    return
                pause = self.spec.retry_seconds * (2**failures - 1)  # none if the engine was of use
                self._woken.wait(min(pause, MAX_RETRY_SECONDS))
        except BaseException as error:  # a defect here is not to leave anybody waiting; the thread reports it
            self._enter("failed", f"the engine is not looked after any more: {error!r}")
            if self._engine is not None:
                self._engine.end(0.0)
            self._tickets.lose(self.state_detail)
            raise

    def _run_engine(self) -> tuple[bool, bool, str]:
        """One engine, from start to end: whether it was of use, whether it must be the last, why it ended.

        What an engine says about the checkpoint before one was ever loaded will not change by trying again.
        """
        is_first = self.loaded is None
        try:
            engine = self._engine = EngineProcess(self.spec)
        except OSError as error:
            return False, False, f"it could not be started: {error}"
        self._num_engines += 1
        was_useful, last_words = self._listen(engine)
        how = engine.end(0.0 if self._is_over or last_words else _LAST_BREATH_SECONDS)
        self._engine = None
        is_final = is_first and self.loaded is None and last_words is not None
        return was_useful, is_final, last_words or how

    def _listen(self, engine: EngineProcess) -> tuple[bool, str | None]:
        """Hand on what the engine reports until it is gone, or as good as gone: whether it was of use, and
        its last words or what is wrong with it."""
        self._heard = time.monotonic()
        is_ready = was_useful = False
        while not self._is_over:
            try:
                message = engine.receive(_LOOK_SECONDS)
            except (EOFError, OSError):
                break
            now = time.monotonic()
            if message is None:
                if is_ready and now - self._heard > self.spec.silent_seconds:
                    return was_useful, f"it has not answered for {now - self._heard:.0f} seconds"
                continue
            self._heard = now
            match message:
                case "events", events, seconds:
                    self._num_steps += 1
                    was_useful = was_useful or _has_token(events)
                    self._tickets.deliver(events, now - seconds)
                case "beat", seconds, cache_usage:
                    self._cache_usage = cache_usage
                    if seconds > self.spec.step_seconds:
                        return was_useful, f"it has been busy with one step for {seconds:.0f} seconds"
                case "ready", loaded:
                    is_ready, self.loaded = True, loaded
                    self._tickets.open(engine, loaded)
                    self._enter("ready", "")
                case "failed", sentence:
                    return was_useful, sentence
        return was_useful, None

    def _enter(self, state: State, detail: str) -> None:
        with self._changing:
            if self.state == "draining":
                return  # a server that stops does nothing else any more
            self.state, self.state_detail = state, detail
        if self._on_state is not None:
            self._on_state(state, detail)


def _has_token(events: Iterable[Event]) -> bool:
    return any(not isinstance(event, TokenEvent) or event.token_id is not None for event in events)
