"""Between callers and the engine: whoever waits for tokens drives it, and finds others' tokens on the way.

One step serves every request there is. So a caller who needs the next token of its own takes one step, and puts what
came out for others into their inboxes.
"""

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

from llama.completion import Completion, Delta, RequestReader
from llama.engine.engine import Engine
from llama.engine.request import Event, QueueFullError, Request, SamplingParams
from llama.model.plan import TracePlan
from llama.text.tokenizer import Tokenizer


class Driver:
    """Runs requests on an engine, from any number of threads, one of which steps at a time."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        self.engine = engine
        self.tokenizer = tokenizer
        self._names = (f"request-{number}" for number in itertools.count())
        self._inboxes: dict[str, deque[Event]] = {}
        self._lock = threading.Lock()

    def stream(self, ids: Sequence[int], params: SamplingParams) -> Iterator[Delta]:
        """One request, token by token; before its first one an empty delta a step, so that a caller who has waited
        long enough can leave. Closing the iterator cancels it. Raises RequestError, GenerationError."""
        reader = RequestReader(self.tokenizer, params, len(ids))
        while (name := self._submit(ids, params)) is None:
            self._step()
        try:
            while not reader.is_done:
                if not self._inboxes[name]:
                    self._step(unless=name)
                if not self._inboxes[name]:
                    yield Delta(0, "", ())
                yield from self._read(name, reader)
        finally:
            self._forget(name)

    def complete(self, requests: Iterable[tuple[Sequence[int], SamplingParams, TracePlan | None]]
                 ) -> Iterator[tuple[int, list[Completion]]]:
        """Many requests, as many together as the engine takes: each one's place and samples as it ends.

        The next request is taken from `requests` when the queue has room for it. Closing the iterator cancels what
        is under way. Raises RequestError, GenerationError.
        """
        upcoming = enumerate(requests)
        following = next(upcoming, None)
        readers: dict[str, tuple[int, RequestReader]] = {}
        try:
            while following is not None or readers:
                while following is not None:
                    place, (ids, params, plan) = following
                    name = self._submit(ids, params, plan)
                    if name is None:
                        break
                    readers[name] = place, RequestReader(self.tokenizer, params, len(ids))
                    following = next(upcoming, None)
                self._step()
                for name in [name for name in readers if self._inboxes[name]]:
                    place, reader = readers[name]
                    for _ in self._read(name, reader):
                        pass
                    if reader.is_done:
                        del readers[name]
                        self._forget(name)
                        yield place, reader.completions()
        finally:
            for name in readers:
                self._forget(name)

    def _submit(self, ids: Iterable[int], params: SamplingParams, plan: TracePlan | None = None) -> str | None:
        """Queue a request; the name under which its events are found, or None while the queue is full."""
        request = Request(next(self._names), tuple(ids), params, trace=plan)
        with self._lock:
            try:
                self.engine.submit(request)
            except QueueFullError:
                return None
            self._inboxes[request.id] = deque()
        return request.id

    def _step(self, unless: str | None = None) -> None:
        """One step of the engine, its events put where their readers look for them; none if, while the caller
        waited for its turn, somebody else's step has brought events for `unless`."""
        with self._lock:
            if unless is not None and self._inboxes[unless]:
                return
            for event in self.engine.step():
                if event.request_id in self._inboxes:
                    self._inboxes[event.request_id].append(event)

    def _read(self, name: str, reader: RequestReader) -> Iterator[Delta]:
        """The deltas of what has come for a request."""
        inbox = self._inboxes[name]
        while inbox:
            delta = reader.read(inbox.popleft())
            if delta is None:
                continue
            if isinstance(delta.stop_reason, str):  # the engine, which sees no text, would go on
                with self._lock:
                    self.engine.cancel(name, delta.index)
            yield delta

    def _forget(self, name: str) -> None:
        """Cancel what is left of a request, and drop its events."""
        with self._lock:
            self.engine.cancel(name)
            del self._inboxes[name]
