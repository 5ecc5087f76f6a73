"""From a call to its answer: requests to the engine, its events to text, text to JSON or server-sent events."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from llama.completion import GenerationError, RequestReader
from llama.engine.request import PromptEvent, QueueFullError, Request, RequestError, TokenEvent
from llama.internals.assemble import TraceError
from server import traces
from server.access import Entry
from server.call import Call
from server.errors import ApiError, refusal
from server.http.exchange import ClientGoneError, EventStream, Exchange
from server.http.hangups import Hangups
from server.metrics import Metrics, Stopwatch
from server.rendering import Chunk, Rendering, dumps
from server.served import Served
from server.supervisor import EngineUnavailableError, Event, Lost, Supervisor, Ticket
from server.traces import TraceStore

JSON = "application/json"
DONE = b"[DONE]"
RETRY_SECONDS = 1  # after which a full queue may have room
LOAD_SECONDS = 5  # after which a model may be loaded
_PUSH_SECONDS = 0.05  # how soon what waits is pushed: the opening, and what a slow reader left


@dataclass(frozen=True)
class Generator:
    """Answers calls by an engine. heartbeat_seconds: after so long without text a stream shows that it lives."""

    supervisor: Supervisor
    hangups: Hangups
    metrics: Metrics
    heartbeat_seconds: float
    traces: TraceStore = field(default_factory=TraceStore)

    def answer(self, exchange: Exchange, entry: Entry, served: Served, call: Call, salt: str) -> None:
        """Generate, and answer the exchange. Raises ApiError, also where a stream has already been broken off with
        it (then exchange.status is set); ClientGoneError."""
        watch = Stopwatch(self.metrics)
        rendering = Rendering(call, served)
        entry.id = rendering.id
        exchange.fields.append(("X-Request-Id", rendering.id))
        requests = [Request(f"{rendering.id}-{number}", prompt, call.params, salt, trace=call.trace)
                    for number, prompt in enumerate(call.prompts)]
        entry.prompt_tokens = sum(map(len, call.prompts))
        ticket = self._submit(requests, watch)
        run = _Run(call, served, rendering, ticket, watch)
        try:
            with self.hangups.watching(exchange.transport.socket, ticket.cancel):
                self._deliver(exchange, run)
        except ClientGoneError:
            watch.fail("cancelled")
            raise
        except _FailedError as error:
            watch.fail(error.reason)
            raise error.answer from None
        else:
            watch.succeed(run.finish_reason, entry.prompt_tokens)
        finally:
            ticket.cancel()
            entry.completion_tokens = watch.num_tokens
            entry.cached_tokens = run.num_cached
            entry.queue_seconds, entry.first_token_seconds = watch.queued, watch.first_token

    def _submit(self, requests: list[Request], watch: Stopwatch) -> Ticket:
        """Hand the requests over. Raises ApiError."""
        try:
            return self.supervisor.submit(requests)
        except RequestError as error:
            watch.fail("refused")
            raise refusal(error) from None
        except QueueFullError as error:
            watch.fail("queue_full")
            raise queue_full(str(error)) from None
        except EngineUnavailableError as error:
            watch.fail("unavailable")
            raise unavailable(error.state, str(error)) from None

    def _deliver(self, exchange: Exchange, run: "_Run") -> None:
        if not run.call.stream:
            reply = run.rendering.reply(itertools.chain.from_iterable(run.chunks(None)))
            if run.call.trace is not None:
                reply["x_trace"] = run.trace(self.traces)
            exchange.answer(200, dumps(reply), JSON)
            return
        stream = exchange.stream()
        pieces = run.chunks(self.heartbeat_seconds, stream)
        stream.keep(map(dumps, next(pieces)))  # the opening: it goes with the first text, or soon without it
        try:
            for chunks in pieces:
                stream.send(map(dumps, chunks))
        except _FailedError as error:
            stream.break_off(dumps(error.answer.body()))
            raise
        stream.send([DONE])
        stream.end()


class _FailedError(Exception):
    """The engine did not bring the call to its end. reason: as `Metrics.failures` has it."""

    def __init__(self, reason: str, answer: ApiError):
        super().__init__(answer.message)
        self.reason = reason
        self.answer = answer


class _Run:
    """One call under way."""

    def __init__(self, call: Call, served: Served, rendering: Rendering, ticket: Ticket, watch: Stopwatch):
        self.call = call
        self._served = served
        self.rendering = rendering
        self._ticket = ticket
        self._watch = watch
        self._readers = {name: RequestReader(served.tokenizer, call.params, len(prompt))
                         for name, prompt in zip(ticket.request_ids, call.prompts)}
        self._places = {name: place for place, name in enumerate(ticket.request_ids)}
        self._reasons: set[str] = set()

    @property
    def finish_reason(self) -> str:
        """Of all choices together: "length" if one of them was cut."""
        return "length" if "length" in self._reasons else "stop"

    def trace(self, store: TraceStore) -> dict[str, Any]:
        """What the call's plan caught, once all chunks are there. Raises _FailedError."""
        [reader] = self._readers.values()
        try:
            return traces.reply(self.call, self._served, reader.captured, len(reader.completions()[0].ids), store)
        except TraceError as error:
            raise _FailedError("refused", ApiError(400, f"x_trace: {error}", param="x_trace",
                                                   code="trace_unfulfilled")) from None

    @property
    def num_cached(self) -> int:
        """Tokens of the prompts that the prefix cache had."""
        return sum(reader.num_cached_tokens for reader in self._readers.values())

    def chunks(self, heartbeat_seconds: float | None, stream: EventStream | None = None) -> Iterator[list[Chunk]]:
        """All chunks of the answer, those that come together in one list.

        Raises _FailedError, and ClientGoneError once the ticket has been cancelled from elsewhere.
        """
        yield self.rendering.opening()
        while events := self._events(heartbeat_seconds, stream):
            chunks, failure = self._read(events)
            if chunks:
                yield chunks
            if failure is not None:
                raise failure
        if not all(reader.is_done for reader in self._readers.values()):
            raise ClientGoneError
        yield self.rendering.closing()

    def _events(self, heartbeat_seconds: float | None, stream: EventStream | None) -> list[Event]:
        """What has come; [] at the end. While nothing is to be said, also where tokens come that say nothing yet,
        the stream is kept alive."""
        if stream is None:
            return self._ticket.get()
        while True:
            silence = stream.silence
            if silence >= heartbeat_seconds:
                stream.beat()
                silence = 0.0
            pause = heartbeat_seconds - silence
            events = self._ticket.get(min(pause, _PUSH_SECONDS) if stream.has_pending else pause)
            if events is not None:
                return events
            stream.push()

    def _read(self, events: list[Event]) -> tuple[list[Chunk], _FailedError | None]:
        """The chunks of events, and what has put an end to them."""
        chunks: list[Chunk] = []
        num_tokens = sum(isinstance(event, TokenEvent) and event.token_id is not None for event in events)
        if self._ticket.began is not None:
            self._watch.progress(num_tokens, self._ticket.began)
        for event in events:
            if isinstance(event, Lost):
                answer = ApiError(503, event.message, code="engine_lost", retry_after=LOAD_SECONDS)
                return chunks, _FailedError("lost", answer)
            try:
                chunks += self._read_one(event)
            except GenerationError as error:
                return chunks, _FailedError("refused" if error.field else "error", self._answer(error))
        return chunks, None

    def _answer(self, error: GenerationError) -> ApiError:
        """How to say that the engine gave up: it is to blame, or a field of the request is."""
        if error.field is None:
            return ApiError(500, str(error), code="generation_failed")
        param = self.call.constraint.field if error.field == "grammar" else error.field
        return ApiError(400, str(error), param=param, code="invalid_value")

    def _read_one(self, event: TokenEvent | PromptEvent) -> list[Chunk]:
        reader = self._readers[event.request_id]
        delta = reader.read(event)
        if delta is None:
            return []
        if delta.finish_reason is not None:
            self._reasons.add(delta.finish_reason)
            if isinstance(delta.stop_reason, str):  # the engine, which sees no text, would go on
                self._ticket.cancel(event.request_id, delta.index)
        return self.rendering.delta(self._places[event.request_id], delta, reader.prompt_logprobs)


def queue_full(detail: str) -> ApiError:
    """The refusal while too much waits."""
    return ApiError(429, f"the queue is full: {detail}", code="queue_full", retry_after=RETRY_SECONDS)


def unavailable(state: str, detail: str) -> ApiError:
    """The refusal while no engine takes requests."""
    return ApiError(503, f"no requests are taken now ({state}): {detail}", code=f"engine_{state}",
                    retry_after=LOAD_SECONDS)
