"""The page in front of a server that says what a test wants: streams cut anywhere, errors, keys, hostile text."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

SPECIALS = {0: "<|begin_of_text|>", 1: "<|start_header_id|>", 2: "<|end_header_id|>", 3: "<|eot_id|>"}
FIRST_BYTE = len(SPECIALS)  # the rest of this vocabulary are the 256 bytes: an emoji is four tokens


def prompt_ids(messages: list[dict[str, str]]) -> list[int]:
    """A conversation in the form of Llama's own template."""
    def plain(text: str) -> list[int]:
        return [FIRST_BYTE + byte for byte in text.encode()]

    turns = [[1, *plain(each["role"]), 2, *plain("\n\n" + each["content"]), 3] for each in messages]
    return [0, *sum(turns, []), 1, *plain("assistant"), 2, *plain("\n\n")]


def prompt_text(ids: Iterable[int]) -> str:
    pieces = [SPECIALS[id].encode() if id in SPECIALS else bytes([id - FIRST_BYTE]) for id in ids]
    return b"".join(pieces).decode("utf-8", "replace")


def token(raw: str | bytes, logprob: float = -0.5, top: Iterable[tuple[str, float]] = ()) -> dict[str, Any]:
    """A token's entry in the log probabilities of a chunk."""
    def entry(raw: str | bytes, logprob: float) -> dict[str, Any]:
        raw = raw.encode() if isinstance(raw, str) else raw
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    return {**entry(raw, logprob), "top_logprobs": [entry(*one) for one in top]}


def event(data: Any) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def chunk(content: str | None = None, tokens: Iterable[dict[str, Any]] = (), finish: str | None = None) -> bytes:
    """One event of a chat's stream; without content, the one with the role."""
    delta = {"role": "assistant"} if content is None else {"content": content}
    logprobs = {"content": list(tokens)} if content is not None else None
    return event({"choices": [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}],
                  "usage": None})


def whole(*words: str) -> list[bytes]:
    """A stream that goes well, a token for each word."""
    usage = {"prompt_tokens": 30, "total_tokens": 30 + len(words) + 1, "completion_tokens": len(words) + 1}
    return [chunk(), *(chunk(word, [token(word)]) for word in words), chunk("", [token("<|eot_id|>")], "stop"),
            event({"choices": [], "usage": usage}), event("[DONE]")]


class Site:
    """Serves the page at `url`, under /some/prefix, and answers as its attributes say.

    stream: what a chat is answered with, in pieces that are sent one by one; a number between them is seconds
    to wait. refusal: (status, message) instead. key: the one to be shown. health: its answer, with 503 unless
    ready. chats: the bodies of the chat requests so far. was_left: whether a reader went away in a stream.
    """

    def __init__(self) -> None:
        self.stream: list[bytes | float] = whole("Hi", " there", ".")
        self.refusal: tuple[int, str] | None = None
        self.key: str | None = None
        self.health = {"status": "ready", "detail": ""}
        self.root = "scripted"
        self.chats: list[dict[str, Any]] = []
        self.was_left = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}/some/prefix"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _policy(page: str) -> str:
    """The strictest policy that the page can live under: its own style and script by their hashes."""
    def hashed(tag: str) -> str:
        inside = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL).group(1)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'"

    return (f"default-src 'none'; style-src {hashed('style')}; script-src {hashed('script')}; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


def _handler(site: Site) -> type[BaseHTTPRequestHandler]:
    page = (resources.files("server") / "web" / "index.html").read_text("utf-8")

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.removeprefix("/some/prefix")
            if path in ("", "/"):
                self._answer(200, page.encode(), "text/html; charset=utf-8",
                             {"Content-Security-Policy": _policy(page)})
            elif path == "/health":
                self._json(200 if site.health["status"] == "ready" else 503, site.health)
            elif self._is_let_in():
                served = {"id": "llama3_1_8b_instruct", "root": site.root, "max_model_len": 2048}
                self._json(200, {"data": [served]} if path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            path = self.path.removeprefix("/some/prefix")
            if not self._is_let_in():
                return
            if path == "/tokenize":
                ids = prompt_ids(body["messages"])
                self._json(200, {"count": len(ids), "max_model_len": 2048, "tokens": ids})
            elif path == "/detokenize":
                self._json(200, {"prompt": prompt_text(body["tokens"])})
            elif site.refusal is not None:
                site.chats.append(body)
                self._error(*site.refusal)
            else:
                site.chats.append(body)
                self._stream()

        def _is_let_in(self) -> bool:
            if site.key is None or self.headers["Authorization"] == f"Bearer {site.key}":
                return True
            self._error(401, "An API key is needed.")
            return False

        def _stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")  # the end of the stream is the end of the connection
            self.end_headers()
            try:
                for piece in site.stream:
                    if isinstance(piece, bytes):
                        self.wfile.write(piece)
                    else:
                        time.sleep(piece)
            except OSError:
                site.was_left.set()
            self.close_connection = True

        def _error(self, status: int, message: str) -> None:
            self._json(status, {"error": {"message": message, "type": "error", "param": None, "code": None}})

        def _json(self, status: int, data: Any) -> None:
            self._answer(status, json.dumps(data).encode(), "application/json", {})

        def _answer(self, status: int, body: bytes, kind: str, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Type": kind, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    return Handler
