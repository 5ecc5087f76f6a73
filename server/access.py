"""The access log: one line for each answer, with what it cost and never what it said."""

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("llama.access")


@dataclass
class Entry:
    """What is known of one exchange when it ends. Times in seconds; None where they do not apply."""

    method: str
    route: str
    peer: str
    id: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    queue_seconds: float | None = None
    first_token_seconds: float | None = None
    began: float = field(default_factory=time.monotonic)

    def write(self, status: int | None) -> None:
        """Log it. status: of the answer; None if the client left before there was one."""
        seconds = time.monotonic() - self.began
        facts: dict[str, Any] = {
            "id": self.id, "peer": self.peer, "method": self.method, "route": self.route,
            "status": status or 499,  # as others write it: the client closed the connection
            "prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens,
            "completion_tokens": self.completion_tokens, "queue_ms": _milliseconds(self.queue_seconds),
            "first_token_ms": _milliseconds(self.first_token_seconds), "total_ms": _milliseconds(seconds)}
        log.info("%s", facts["route"], extra={"facts": {name: each for name, each in facts.items()
                                                        if each is not None}})


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 1)


class LineFormatter(logging.Formatter):
    """A line for people: the time, then the facts as name=value."""

    def format(self, record: logging.LogRecord) -> str:
        """The record on one line, but for a traceback."""
        facts = getattr(record, "facts", None)
        text = record.getMessage() if facts is None else " ".join(f"{name}={value}" for name, value in facts.items())
        line = f"{_timestamp(record)} {text}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """A line for machines: one JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        facts = getattr(record, "facts", None) or {"message": record.getMessage()}
        if record.exc_info:
            facts = facts | {"traceback": self.formatException(record.exc_info)}
        return json.dumps({"time": _timestamp(record), "level": record.levelname.lower(), **facts},
                          ensure_ascii=False)


def _timestamp(record: logging.LogRecord) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"
