"""`llama serve`: from flags to a server that runs until a signal ends it."""

import argparse
import logging
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import FrameType

from llama import __version__
from server.access import JsonFormatter, LineFormatter
from server.flags import KEY_VARIABLE, NAME
from server.front import Front, Settings
from server.http import HttpLimits
from server.isolate import sentence
from server.origins import is_local
from server.wire import EngineSpec

_ROUTES = """\
  POST {url}/project/p-1/genai/{name}/v1/chat/completions?project_id=1
  POST {url}/v1/chat/completions    /v1/completions    /tokenize    /detokenize
  GET  {url}/v1/models    /health    /ready    /version    /metrics    /openapi.json
  GET  {url}/                       a page to try it
try: curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} \
-d '{{"messages":[{{"role":"user","content":"Hello"}}]}}'"""


class ServeError(ValueError):
    """Flags that cannot be served by; the message says what to change."""


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes or the engine cannot go on; the exit status."""
    _set_up_log(args)
    try:
        settings = _settings(args)
        try:
            server = _Server(settings, args.drain_seconds)
        except OSError as error:
            raise ServeError(f"cannot listen on {args.host}, port {args.port}: {error.strerror}") from None
        return server.run()
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        sys.stderr.write(f"llama: error: {' '.join(sentence(error).splitlines())}\n")
        return 1


class _Server:
    """A front, the signals that end it, and what it tells the terminal."""

    def __init__(self, settings: Settings, drain_seconds: float):
        self._front = Front(settings, self._note_state)
        self._drain_seconds = drain_seconds
        self._is_ending = False
        self._bell, self._rung = socket.socketpair()  # wakes the main thread, which alone handles signals
        self._bell.setblocking(False)
        self._failure: str | None = None
        self._is_loading = True
        self._was_ready = False

    def run(self) -> int:
        """Serve until a signal or a failure ends it; the exit status."""
        model = self._front.settings.spec.model or "the demo model"
        try:
            # The system may give a signal to any thread, and the main one would sleep on.
            signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._handle)
            print(f"llama {__version__} at {self._front.url} loads {model}", flush=True)
            self._front.start()
            self._is_loading = False
            while not self._is_ending:
                self._rung.recv(1)
        except KeyboardInterrupt:
            pass  # while the checkpoint was still being fetched or read
        finally:
            self._front.stop(self._drain_seconds if self._failure is None else 0.0)
            signal.set_wakeup_fd(-1)
        if self._failure is not None:
            sys.stderr.write(f"llama: error: {self._failure}\n")
        return 0 if self._failure is None else 1

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_loading:
            self._is_loading = False
            raise KeyboardInterrupt
        if self._is_ending:
            self._front.stop(0.0)
        self._is_ending = True

    def _note_state(self, state: str, detail: str) -> None:
        if state == "failed":
            self._failure = detail
            self._is_ending = True
            self._bell.send(b"!")
        elif state == "ready":
            print("the engine is ready again" if self._was_ready else self._greeting(), flush=True)
            self._was_ready = True
        elif state == "lost" or self._was_ready and detail:
            logging.getLogger("llama.server").warning("%s: %s", state, detail)

    def _greeting(self) -> str:
        settings, served = self._front.settings, self._front.routes.served
        details = self._front.supervisor.loaded.details
        facts = ", ".join(f"{details[name]}{unit}" for name, unit in (("dtype", ""), ("device", "")) if name in details)
        key = " -H 'Authorization: Bearer KEY'" if settings.keys else ""
        return "\n".join([
            f"ready: {served.root} ({facts}), served as {', '.join(served.names)}; context {served.max_context:,} "
            "tokens", _ROUTES.format(url=self._front.url, name=served.names[0], key=key)])


def _settings(args: argparse.Namespace) -> Settings:
    """What the flags and the environment say. Raises ServeError."""
    keys = _keys(args)
    if not is_local(args.host) and not keys and not args.allow_anonymous:
        raise ServeError(f"{args.host} can be reached from elsewhere, and there is no API key; give --api-key, "
                         "--api-key-file or --allow-anonymous")
    options = {"dtype": args.dtype, "device": args.device, "quantize": args.quantize, "max_context": args.context,
               "kv_cache_bytes": args.kv_cache, "kv_cache_dtype": args.kv_cache_dtype,
               "prompt_lookup": args.prompt_lookup, "draft": args.draft, "deterministic": args.deterministic,
               "progress": False}
    if args.max_running is not None:
        options["limits"] = {"max_running": args.max_running}
    spec = EngineSpec(args.model, options, args.threads, max_queued_requests=args.max_queued,
                      max_queued_tokens=args.max_queued_tokens)
    return Settings(names=tuple(dict.fromkeys(args.served_model_name or [NAME])), spec=spec,
                    max_context=args.context, host=args.host, port=args.port, root_path=args.root_path, keys=keys,
                    allowed_hosts=tuple(args.allow_host), allowed_origins=tuple(args.allow_origin),
                    limits=HttpLimits(connections=args.max_connections),
                    heartbeat_seconds=args.heartbeat_seconds, has_traces=args.enable_trace)


def _keys(args: argparse.Namespace) -> tuple[str, ...]:
    keys = [*(args.api_key or ()), *filter(None, os.environ.get(KEY_VARIABLE, "").split(","))]
    if args.api_key_file is not None:
        try:
            keys += Path(args.api_key_file).read_text("utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"--api-key-file {args.api_key_file} cannot be read: {error}") from None
        if not keys:
            raise ServeError(f"--api-key-file {args.api_key_file} has no key in it")
    for key in keys:
        if not key.isascii() or not key.isprintable() or not key or " " in key:
            raise ServeError("an API key must be printable ASCII without spaces, and not empty")
    return tuple(keys)


def _set_up_log(args: argparse.Namespace) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if args.log_format == "json" else LineFormatter())
    logger = logging.getLogger("llama")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    logging.getLogger("llama.access").disabled = not args.access_log
