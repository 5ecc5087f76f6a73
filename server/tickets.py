"""Who waits for what: the requests under way, and the queue of events for each asker. Free of torch."""

import threading
from collections.abc import Iterable, Iterator, Sequence as Ordered
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from llama.engine.request import Event as EngineEvent
from llama.engine.request import PromptEvent, QueueFullError, Request, RequestError, TraceEvent
from server.process import EngineProcess
from server.wire import EngineSpec, Loaded


@dataclass(frozen=True)
class Lost:
    """The last event of a ticket whose engine is gone: nothing more comes for any of its requests."""

    message: str


Event = EngineEvent | Lost


class Ticket:
    """The events of requests that were submitted together, for one thread to read, in the engine's order.

    began: when the first step for one of them did, as time.monotonic says; None before that step has ended.
    """

    def __init__(self, tickets: "Tickets", request_ids: tuple[str, ...]):
        self.request_ids = request_ids
        self.began: float | None = None
        self._tickets = tickets
        self._inbox: SimpleQueue[list[Event] | None] = SimpleQueue()  # None: nothing more will come
        self._is_over = False

    def get(self, timeout: float | None = None) -> list[Event] | None:
        """All that has come since the last call, having waited for something to come; [] when all is over.

        None if nothing has come for `timeout` seconds.
        """
        events: list[Event] = []
        while not self._is_over and (not events or not self._inbox.empty()):
            try:
                batch = self._inbox.get(timeout=timeout)
            except Empty:
                return None
            self._is_over = batch is None
            events += batch or ()
        return events

    def __iter__(self) -> Iterator[Event]:
        while events := self.get():
            yield from events

    def cancel(self, request_id: str | None = None, index: int | None = None) -> None:
        """Want no more of a sample, of a request, or of all. The engine obeys before its next step.

        Any thread may; events that have come already can still be read, and what has ended stays as it ended.
        """
        self._tickets.cancel(self, request_id, index)


@dataclass
class _Entry:
    """A request under way. samples: those that have not ended. It waits until it has brought something."""

    ticket: Ticket
    num_prompt: int
    samples: set[int]
    is_waiting: bool = True


class Tickets:
    """All requests under way, and the engine that they are at. Its methods may be called by any thread."""

    def __init__(self, spec: EngineSpec):
        self._spec = spec
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._num_open: dict[Ticket, int] = {}  # requests that have not ended
        self._engine: EngineProcess | None = None
        self._loaded: Loaded | None = None
        self._takes_new = False
        self._counts = dict.fromkeys(("prompt_tokens", "cached_tokens", "generated_tokens"), 0)

    def __len__(self) -> int:
        return len(self._entries)

    def open(self, engine: EngineProcess, loaded: Loaded) -> None:
        """From now on requests are taken, and go to this engine."""
        with self._lock:
            self._engine, self._loaded, self._takes_new = engine, loaded, True

    def lose(self, message: str) -> None:
        """Take no new ones, and end every ticket with a Lost: the engine is gone."""
        with self._lock:
            self._takes_new = False
            self._engine = None
            for ticket in self._num_open:
                ticket._inbox.put([Lost(message)])
                ticket._inbox.put(None)
            self._entries.clear()
            self._num_open.clear()

    def submit(self, requests: Ordered[Request]) -> Ticket | None:
        """Send all of these to the engine; None if it takes none now. Raises RequestError, QueueFullError."""
        ticket = Ticket(self, tuple(request.id for request in requests))
        with self._lock:
            if not self._takes_new:
                return None
            self._refuse(requests)
            for request in requests:
                samples = set(range(request.params.n))
                self._entries[request.id] = _Entry(ticket, len(request.prompt_ids), samples)
            self._num_open[ticket] = len(requests)
            engine = self._engine
        engine.send(("submit", *requests))
        return ticket

    @property
    def is_full(self) -> bool:
        """Whether as many requests wait as may: whatever is submitted now is refused."""
        with self._lock:
            return sum(entry.is_waiting for entry in self._entries.values()) >= self._spec.max_queued_requests

    def _refuse(self, requests: Ordered[Request]) -> None:
        """The bounds that the protocol does not know: of the cache, of a step, of the queue."""
        loaded, spec = self._loaded, self._spec
        for request in requests:
            num_prompt, n = len(request.prompt_ids), request.params.n
            max_tokens = request.params.max_tokens or 1
            if num_prompt + max_tokens > loaded.max_context:
                field = "max_tokens" if num_prompt < loaded.max_context else "prompt"
                raise RequestError(field, f"the prompt's {num_prompt} tokens and max_tokens {max_tokens} "
                                   f"together exceed the {loaded.max_context} tokens that the engine holds; "
                                   "lower one of them")
            if n > loaded.max_running:
                raise RequestError("n", f"n is {n}, but at most {loaded.max_running} sequences run at once")
        waiting = [entry.num_prompt for entry in self._entries.values() if entry.is_waiting]
        tokens = sum(len(request.prompt_ids) for request in requests)
        if waiting and len(waiting) + len(requests) > spec.max_queued_requests:
            raise QueueFullError(f"{len(waiting)} requests wait already; try again later")
        if waiting and sum(waiting) + tokens > spec.max_queued_tokens:
            raise QueueFullError(f"prompts of {sum(waiting)} tokens wait already; try again later")

    def deliver(self, events: Iterable[EngineEvent], began: float) -> None:
        """Hand each event of a step to whoever still wants it: one batch, and one waking, a ticket."""
        batches: dict[Ticket, list[Event]] = {}
        with self._lock:
            for event in events:
                entry = self._entries.get(event.request_id)
                if entry is not None and self._enter(entry, event):
                    batches.setdefault(entry.ticket, []).append(event)
            for ticket, batch in batches.items():
                if ticket.began is None:
                    ticket.began = began
                ticket._inbox.put(batch)
                self._end_if_over(ticket)

    def _enter(self, entry: _Entry, event: EngineEvent) -> bool:
        """Put an event into the books. False if it is of a sample that is not wanted any more."""
        if isinstance(event, PromptEvent):
            if entry.is_waiting:
                self._counts["prompt_tokens"] += entry.num_prompt
                self._counts["cached_tokens"] += event.num_cached
        elif isinstance(event, TraceEvent):
            return True
        elif event.index not in entry.samples:
            return False
        else:
            self._counts["generated_tokens"] += event.token_id is not None
            if event.finish_reason is not None:
                self._end_samples(event.request_id, entry, {event.index})
        entry.is_waiting = False
        return True

    def cancel(self, ticket: Ticket, request_id: str | None, index: int | None) -> None:
        """See Ticket.cancel."""
        cancelled = []
        with self._lock:
            for name in ticket.request_ids if request_id is None else (request_id,):
                entry = self._entries.get(name)
                if entry is not None and entry.ticket is ticket and (index is None or index in entry.samples):
                    cancelled.append(name)
                    self._end_samples(name, entry, entry.samples if index is None else {index})
            if cancelled:
                self._end_if_over(ticket)
            engine = self._engine
        for name in cancelled:
            engine.send(("cancel", name, index))

    def _end_samples(self, request_id: str, entry: _Entry, samples: set[int]) -> None:
        entry.samples = entry.samples - samples
        if not entry.samples:
            del self._entries[request_id]
            self._num_open[entry.ticket] -= 1

    def _end_if_over(self, ticket: Ticket) -> None:
        if self._num_open.get(ticket) == 0:
            del self._num_open[ticket]
            ticket._inbox.put(None)

    def counts(self) -> dict[str, Any]:
        """Requests running and waiting; tokens of prompts so far, of these cached ones, and generated."""
        with self._lock:
            waiting = sum(entry.is_waiting for entry in self._entries.values())
            return {"running": len(self._entries) - waiting, "waiting": waiting, **self._counts}
