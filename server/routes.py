"""Path to answer: who may ask, what is asked for, and which room of the server answers it."""

import hashlib
import hmac
import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any
from urllib.parse import parse_qsl

from llama import __version__
from server import metrics
from server.access import Entry
from server.errors import ApiError
from server.generation import JSON, LOAD_SECONDS, Generator, queue_full, unavailable
from server.http.exchange import ClientGoneError, Exchange
from server.http.head import Head
from server.openapi import openapi
from server.origins import Origins
from server.protocol import detokenize, parse_chat, parse_completion, tokenize
from server.rendering import dumps
from server.served import Served

log = logging.getLogger("llama.server")

# The page is one file, styles and script within; nothing else may run in it, and it may ask nobody but this server.
_PAGE_FIELDS = (
    ("Content-Security-Policy", "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
     "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"),
    ("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer"), ("Cache-Control", "no-cache"))
_PROJECT = r"/project/p-(?P<project>[^/]*)/genai/(?P<name>.+)/v1/chat/completions"
_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")

# Requests are read so many at a time, large bodies by themselves: whoever else waits for the interpreter, as a probe of
# /health does, waits for no more than these, however many come at once.
_READERS = 2
_LARGE_BODY = 64 * 1024

Answer = Callable[..., None]


@dataclass(frozen=True)
class Route:
    """One path. pattern: of the whole path; its groups are given to `answer` by name. name: as the log and the
    metrics call it. is_open: no key is asked for."""

    method: str
    name: str
    pattern: re.Pattern[str]
    answer: Answer
    is_open: bool = False

    @property
    def methods(self) -> tuple[str, ...]:
        """What may be done with the path."""
        return (self.method, "HEAD", "OPTIONS") if self.method == "GET" else (self.method, "OPTIONS")


class Routes:
    """Answers exchanges. served: set once the checkpoint's text side is loaded. keys: the API keys, none: all may
    ask. root_path: what all paths begin with."""

    def __init__(self, generator: Generator, origins: Origins, measured: metrics.Metrics,
                 keys: Iterable[str] = (), root_path: str = ""):
        self.served: Served | None = None
        self._generator = generator
        self._supervisor = generator.supervisor
        self._origins = origins
        self._metrics = measured
        self._digests = [_digest(key.encode()) for key in keys]
        self._root_path = root_path
        self._turns = {is_large: threading.Semaphore(_READERS) for is_large in (False, True)}
        self._page = (resources.files("server") / "web" / "index.html").read_bytes()
        self._routes = [
            Route("POST", "/v1/chat/completions", re.compile("/v1/chat/completions"), self._chat),
            Route("POST", "/project/p-{Project_Id}/genai/{name}/v1/chat/completions", re.compile(_PROJECT),
                  self._project_chat),
            Route("POST", "/v1/completions", re.compile("/v1/completions"), self._completion),
            Route("GET", "/v1/models", re.compile("/v1/models"), self._models),
            Route("GET", "/v1/models/{id}", re.compile("/v1/models/(?P<name>.+)"), self._model),
            Route("GET", "/v1/traces/{id}", re.compile("/v1/traces/(?P<name>[^/]+)"), self._trace),
            Route("POST", "/tokenize", re.compile("/tokenize"), partial(self._convert, tokenize)),
            Route("POST", "/detokenize", re.compile("/detokenize"), partial(self._convert, detokenize)),
            Route("GET", "/health", re.compile("/health"), self._health, is_open=True),
            Route("GET", "/ready", re.compile("/ready"), self._ready, is_open=True),
            Route("GET", "/version", re.compile("/version"), self._version, is_open=True),
            Route("GET", "/metrics", re.compile("/metrics"), self._report),
            Route("GET", "/openapi.json", re.compile("/openapi.json"), self._openapi),
            Route("GET", "/", re.compile("/"), self._show_page, is_open=True),
        ]

    def handle(self, exchange: Exchange) -> None:
        """Answer, whatever happens, and write it down. Raises ClientGoneError."""
        entry = Entry(exchange.head.method[:32], "unknown", exchange.peer)
        try:
            self._answer(exchange, entry)
        except ApiError as error:
            if exchange.status is None:
                self._send_error(exchange, error)
        except ClientGoneError:
            raise
        except Exception:
            log.exception("a defect, in answering %s", entry.route)
            exchange.close_after = True
            if exchange.status is None:
                self._send_error(exchange, ApiError(500, "the server has a defect; its log says more"))
        finally:
            self._count(exchange, entry)

    def refuse(self, exchange: Exchange, error: ApiError) -> None:
        """Answer what has no path: a request whose head was no good. Raises ClientGoneError."""
        entry = Entry("-", "unknown", exchange.peer)
        try:
            self._send_error(exchange, error)
        finally:
            self._count(exchange, entry)

    # ---- from head to route ------------------------------------------------------------------------------

    def _answer(self, exchange: Exchange, entry: Entry) -> None:
        head = exchange.head
        if self._supervisor.state == "draining":
            exchange.close_after = True
        exchange.fields += self._origins.check(head)
        if head.method == "OPTIONS" and head.path == "*":  # of the server as a whole: RFC 9110, 9.3.7
            return exchange.answer(204, b"", "", [("Allow", "GET, HEAD, POST, OPTIONS")])
        path = self._path(head.path)
        found = [(route, match) for route in self._routes if (match := route.pattern.fullmatch(path))]
        if not found:
            raise ApiError(404, f"there is no {path[:200]!r} here; /openapi.json lists what there is",
                           code="not_found")
        route, match = found[0]
        entry.route = route.name
        if head.method == "OPTIONS":
            return exchange.answer(204, b"", "", [("Allow", ", ".join(route.methods))])
        if head.method not in route.methods:
            exchange.fields.append(("Allow", ", ".join(route.methods)))
            raise ApiError(405, f"{route.name} takes {' and '.join(route.methods)}, not {head.method[:32]}",
                           code="method_not_allowed")
        salt = "" if route.is_open else self._authorize(head)
        if route.method == "POST":
            _require_json(head)
            return route.answer(exchange, entry, salt, **match.groupdict())
        return route.answer(exchange, **match.groupdict())

    def _path(self, path: str) -> str:
        """The path below the root path; doubled slashes and one at the end are forgiven."""
        path = re.sub("//+", "/", path)
        root = self._root_path
        if root and path != root and not path.startswith(f"{root}/"):
            raise ApiError(404, f"everything here is under {root}", code="not_found")
        return path[len(root):].rstrip("/") or "/"

    def _authorize(self, head: Head) -> str:
        """Check the key, in a time that says nothing about it; the salt of its prefix cache."""
        if not self._digests:
            return ""
        scheme, _, key = (head.get("authorization") or "").partition(" ")
        given = _digest(key.strip().encode("latin-1"))  # as the head was decoded
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(401, "the API key is missing or wrong; send `Authorization: Bearer KEY`",
                           code="invalid_api_key")
        return given.hex()

    # ---- what generates ----------------------------------------------------------------------------------

    def _chat(self, exchange: Exchange, entry: Entry, salt: str, name: str | None = None) -> None:
        """name: of the model, where the body gives none."""
        served = self._served()
        self._refuse_early()
        call = self._read(exchange, parse_chat, served, name)
        self._generator.answer(exchange, entry, served, call, salt)

    def _project_chat(self, exchange: Exchange, entry: Entry, salt: str, project: str, name: str) -> None:
        _check_project(exchange.head.query, project)
        self._served().refuse_unknown(name)
        self._chat(exchange, entry, salt, name)

    def _completion(self, exchange: Exchange, entry: Entry, salt: str) -> None:
        served = self._served()
        self._refuse_early()
        call = self._read(exchange, parse_completion, served)
        self._generator.answer(exchange, entry, served, call, salt)

    def _refuse_early(self) -> None:
        """Before a body is read for nothing."""
        state = self._supervisor.state
        if state != "ready":
            self._metrics.failures.inc(reason="unavailable")
            raise unavailable(state, self._supervisor.state_detail)
        if self._supervisor.is_full:
            self._metrics.failures.inc(reason="queue_full")
            raise queue_full("as many requests wait as may; try again later")

    def _read(self, exchange: Exchange, read: Callable[..., Any], *arguments: Any) -> Any:
        """What `read` makes of the body, when its turn has come."""
        body = exchange.read_body()
        with self._turns[len(body) > _LARGE_BODY]:
            return read(body, *arguments)

    def _served(self) -> Served:
        if self.served is None:
            raise unavailable("loading", "the checkpoint is being read")
        return self.served

    # ---- what does not -----------------------------------------------------------------------------------

    def _convert(self, convert: Callable[[bytes, Served], Any], exchange: Exchange, entry: Entry,
                 salt: str) -> None:
        served = self._served()
        _send_json(exchange, self._read(exchange, convert, served))

    def _models(self, exchange: Exchange) -> None:
        _send_json(exchange, self._served().models())

    def _model(self, exchange: Exchange, name: str) -> None:
        _send_json(exchange, self._served().model(name))

    def _trace(self, exchange: Exchange, name: str) -> None:
        exchange.answer(200, self._generator.traces.fetch(name), "application/octet-stream")

    def _health(self, exchange: Exchange) -> None:
        """Live while the engine is, or is being loaded; before there is one, the checkpoint may be on its way."""
        snapshot = self._supervisor.snapshot()
        is_silent = snapshot["num_engines"] > 0 and (snapshot["heartbeat_age"]
                                                     > self._supervisor.spec.silent_seconds)
        is_live = snapshot["state"] in ("loading", "ready", "draining") and not is_silent
        engine = {name: snapshot[name] for name in ("heartbeat_age", "num_engines", "running", "waiting")}
        _send_json(exchange, {"status": snapshot["state"], "detail": snapshot["state_detail"], "engine": engine},
                   200 if is_live else 503)

    def _ready(self, exchange: Exchange) -> None:
        state, detail = self._supervisor.state, self._supervisor.state_detail
        is_ready = state == "ready" and self.served is not None
        fields = [] if is_ready else [("Retry-After", str(LOAD_SECONDS))]
        _send_json(exchange, {"status": state, "detail": detail}, 200 if is_ready else 503, fields)

    def _version(self, exchange: Exchange) -> None:
        _send_json(exchange, {"version": __version__})

    def _report(self, exchange: Exchange) -> None:
        text = self._metrics.render(self._supervisor.snapshot())
        exchange.answer(200, text.encode(), metrics.CONTENT_TYPE)

    def _openapi(self, exchange: Exchange) -> None:
        _send_json(exchange, openapi(self._served(), self._root_path))

    def _show_page(self, exchange: Exchange) -> None:
        exchange.answer(200, self._page, "text/html; charset=utf-8", _PAGE_FIELDS)

    # ---- errors and the log ------------------------------------------------------------------------------

    def _send_error(self, exchange: Exchange, error: ApiError) -> None:
        fields = [] if error.retry_after is None else [("Retry-After", str(error.retry_after))]
        if error.status == 401:
            fields.append(("WWW-Authenticate", "Bearer"))
        exchange.answer(error.status, dumps(error.body()), JSON, fields)

    def _count(self, exchange: Exchange, entry: Entry) -> None:
        status = "none" if exchange.status is None else str(exchange.status)
        self._metrics.responses.inc(method=_known_method(entry.method), route=entry.route, status=status)
        entry.write(exchange.status)


def _known_method(method: str) -> str:
    """So that no client can make labels without number."""
    return method if method in ("GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH") else "other"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _require_json(head: Head) -> None:
    """A page elsewhere can send other types without being asked first, so none of them is taken for JSON."""
    kind, _, parameters = (head.get("content-type") or "").partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if kind.strip().lower() != JSON or charset not in ("", "charset=utf-8"):
        raise ApiError(415, "the body must be JSON: send `Content-Type: application/json`", code="not_json")
    if not head.has_body and head.get("content-length") is None:
        raise ApiError(411, "a body is missing: send Content-Length, or Transfer-Encoding: chunked",
                       code="length_required")


def _check_project(query: str, project: str) -> None:
    values = [value for name, value in parse_qsl(query, keep_blank_values=True) if name == "project_id"]
    if len(values) != 1 or not _INTEGER.fullmatch(values[0]):
        raise ApiError(400, "the query parameter project_id is required, once, and must be an integer",
                       param="project_id", code="invalid_value")
    if not _INTEGER.fullmatch(project) or int(project) != int(values[0]):
        raise ApiError(400, f"project_id is {values[0]}, but the path has p-{project[:64]}; they must be the same",
                       param="project_id", code="invalid_value")


def _send_json(exchange: Exchange, data: Mapping[str, Any], status: int = 200,
               fields: Iterable[tuple[str, str]] = ()) -> None:
    exchange.answer(status, dumps(data), JSON, fields)
