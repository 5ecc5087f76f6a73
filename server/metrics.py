"""What the server counts and measures, as Prometheus reads it (text exposition format 0.0.4).

Where a name after the prefix is one of vLLM's, it means the same, so that dashboards for the one fit the
other.
"""

import math
import threading
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence as Ordered
from typing import Any

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Upper bounds in seconds. A demo model's step takes a millisecond, a long prompt on two cores takes minutes.
FIRST_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
PER_TOKEN_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2.5)
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metric:
    """One name with its help, and a value for each combination of its labels' values. Thread-safe."""

    kind = "untyped"

    def __init__(self, name: str, help_text: str, labels: Ordered[str] = ()):
        self.name = name
        self.help_text = help_text
        self.labels = tuple(labels)
        self._lock = threading.Lock()
        self._values: dict[tuple[str, ...], Any] = {}
        if not labels:
            self._values[()] = self._zero()

    def _zero(self) -> Any:
        return 0

    def _key(self, labels: Mapping[str, str]) -> tuple[str, ...]:
        if labels.keys() != set(self.labels):
            raise ValueError(f"{self.name} has the labels {self.labels}, not {tuple(labels)}")
        return tuple(str(labels[name]) for name in self.labels)

    def lines(self, common: Mapping[str, str]) -> Iterator[str]:
        """The metric in the exposition format; `common` are labels that stand before its own."""
        yield f"# HELP {self.name} {_escape(self.help_text)}"
        yield f"# TYPE {self.name} {self.kind}"
        with self._lock:
            samples = [({**common, **dict(zip(self.labels, key))}, self._copy(value))
                       for key, value in self._values.items()]
        for labels, value in samples:
            yield from self._sample_lines(labels, value)

    def _copy(self, value: Any) -> Any:
        return value

    def _sample_lines(self, labels: Mapping[str, str], value: Any) -> Iterator[str]:
        yield _line(self.name, labels, value)


class Counter(Metric):
    """What only grows."""

    kind = "counter"

    def inc(self, amount: float = 1, **labels: str) -> None:
        """Add to it; amount is not negative."""
        if amount < 0:
            raise ValueError(f"{self.name} is a counter and cannot shrink by {-amount}")
        key = self._key(labels)
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount


class Gauge(Metric):
    """What goes up and down."""

    kind = "gauge"

    def add(self, amount: float = 1, **labels: str) -> None:
        """Change it by an amount of either sign."""
        key = self._key(labels)
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount


class Histogram(Metric):
    """How often a value fell below each of some bounds, and the sum of all values."""

    kind = "histogram"

    def __init__(self, name: str, help_text: str, bounds: Iterable[float], labels: Ordered[str] = ()):
        self.bounds = (*bounds, math.inf)
        super().__init__(name, help_text, labels)

    def _zero(self) -> list[float]:
        return [0] * len(self.bounds) + [0.0]  # how many fell between each bound and the one before; the sum

    def _copy(self, value: list[float]) -> list[float]:
        return value[:]

    def observe(self, value: float, **labels: str) -> None:
        """Enter a value."""
        key = self._key(labels)
        with self._lock:
            counts = self._values.setdefault(key, self._zero())
            counts[bisect_left(self.bounds, value)] += 1
            counts[-1] += value

    def _sample_lines(self, labels: Mapping[str, str], value: list[float]) -> Iterator[str]:
        *counts, total = value
        below = 0
        for bound, count in zip(self.bounds, counts):
            below += count
            yield _line(f"{self.name}_bucket", {**labels, "le": _number(bound)}, below)
        yield _line(f"{self.name}_sum", labels, total)
        yield _line(f"{self.name}_count", labels, below)


class Metrics:
    """All that the server measures itself; the engine's numbers come from Supervisor.snapshot when asked for.

    model_name: the label that every metric carries, as vLLM's do.
    """

    def __init__(self, model_name: str):
        self._common = {"model_name": model_name}
        self.successes = Counter("llama:request_success_total", "Requests answered whole, by how they ended.",
                                 ["finished_reason"])
        self.failures = Counter("llama:request_failure_total", "Requests not answered whole, by why: "
                                "refused, queue_full, unavailable, cancelled, lost, error.", ["reason"])
        self.responses = Counter("llama:http_responses_total", "HTTP responses.",
                                 ["method", "route", "status"])
        self.connections = Gauge("llama:http_connections", "Open connections.")
        self.first_token = Histogram("llama:time_to_first_token_seconds",
                                     "From a request's arrival to its first token.", FIRST_TOKEN_BUCKETS)
        self.per_token = Histogram("llama:request_time_per_output_token_seconds",
                                   "Mean time between a request's tokens.", PER_TOKEN_BUCKETS)
        self.whole = Histogram("llama:e2e_request_latency_seconds",
                               "From a request's arrival to its last token.", REQUEST_BUCKETS)
        self.queued = Histogram("llama:request_queue_time_seconds",
                                "From a request's arrival to its first step.", REQUEST_BUCKETS)
        self.prompt_length = Histogram("llama:request_prompt_tokens",
                                       "Tokens in a request's prompt.", TOKEN_BUCKETS)
        self.answer_length = Histogram("llama:request_generation_tokens",
                                       "Tokens generated for a request.", TOKEN_BUCKETS)
        self._own = [metric for metric in vars(self).values() if isinstance(metric, Metric)]

    def render(self, snapshot: Mapping[str, Any]) -> str:
        """All metrics in the exposition format. snapshot: Supervisor.snapshot()."""
        lines = [line for metric in self._own for line in metric.lines(self._common)]
        for kind, name, key, help_text in _FROM_SNAPSHOT:
            lines += [f"# HELP {name} {_escape(help_text)}", f"# TYPE {name} {kind}",
                      _line(name, self._common, snapshot[key])]
        lines += ["# HELP llama:engine_state The engine's state: 1 for the one that it is in.",
                  "# TYPE llama:engine_state gauge"]
        for state in ("loading", "ready", "draining", "lost", "failed"):
            labels = {**self._common, "state": state}
            lines.append(_line("llama:engine_state", labels, int(snapshot["state"] == state)))
        return "\n".join(lines) + "\n"


class Stopwatch:
    """One request's times, in seconds since it arrived, entered into the histograms when it ends."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._arrived = time.monotonic()
        self._last_token = 0.0
        self.queued: float | None = None
        self.first_token: float | None = None
        self.num_tokens = 0

    @property
    def elapsed(self) -> float:
        """Since the request arrived."""
        return time.monotonic() - self._arrived

    def progress(self, num_tokens: int, began: float) -> None:
        """The engine has brought something: so many tokens, or none yet. began: Ticket.began."""
        now = self.elapsed
        if self.queued is None:
            self.queued = max(began - self._arrived, 0.0)
        if num_tokens:
            if self.first_token is None:
                self.first_token = now
            self.num_tokens += num_tokens
            self._last_token = now

    def succeed(self, finished_reason: str, num_prompt_tokens: int) -> None:
        """The request was answered whole."""
        metrics = self._metrics
        metrics.successes.inc(finished_reason=finished_reason)
        metrics.whole.observe(self._last_token)
        metrics.prompt_length.observe(num_prompt_tokens)
        metrics.answer_length.observe(self.num_tokens)
        self._enter_beginning()
        if self.num_tokens > 1:
            metrics.per_token.observe((self._last_token - self.first_token) / (self.num_tokens - 1))

    def fail(self, reason: str) -> None:
        """It was not: see `Metrics.failures` for the reasons."""
        self._metrics.failures.inc(reason=reason)
        self._enter_beginning()

    def _enter_beginning(self) -> None:
        if self.queued is not None:
            self._metrics.queued.observe(self.queued)
        if self.first_token is not None:
            self._metrics.first_token.observe(self.first_token)


_FROM_SNAPSHOT = (
    ("gauge", "llama:num_requests_running", "running", "Requests that the engine has begun."),
    ("gauge", "llama:num_requests_waiting", "waiting", "Requests that wait to be begun."),
    ("gauge", "llama:kv_cache_usage_perc", "cache_usage", "Share of the KV cache that is held; 1 is all."),
    ("counter", "llama:prefix_cache_queries_total", "prompt_tokens", "Prompt tokens looked up in the cache."),
    ("counter", "llama:prefix_cache_hits_total", "cached_tokens", "Prompt tokens found in the cache."),
    ("counter", "llama:prompt_tokens_total", "prompt_tokens", "Tokens of prompts."),
    ("counter", "llama:generation_tokens_total", "generated_tokens", "Tokens generated."),
    ("counter", "llama:engine_steps_total", "num_steps", "Steps that brought something."),
    ("counter", "llama:engine_starts_total", "num_engines", "Engines started; all but one of them are lost."),
    ("gauge", "llama:engine_heartbeat_age_seconds", "heartbeat_age", "Since the engine was last heard."),
)


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{key}="{_escape(text, quoted=True)}"' for key, text in labels.items())
    return f"{name}{{{inside}}} {_number(value)}"


def _number(value: float) -> str:
    return "+Inf" if value == math.inf else repr(value)


def _escape(text: str, quoted: bool = False) -> str:
    text = text.replace("\\", "\\\\").replace("\n", "\\n")
    return text.replace('"', '\\"') if quoted else text
