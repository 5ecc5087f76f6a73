"""Hundreds of requests that are none, over real sockets: each is answered or its connection closed, and all is well.

No answer has a status of 500 or more but 501 and 505, none is cut short, nobody is kept waiting, and nothing is
logged as a defect. `FLAWED` must be refused, with the status that stands beside each; of `MANGLED`, good requests
with a byte or two changed, some are still good.
"""

import json
import logging
import random
from dataclasses import dataclass

import pytest

from tests.server.live import serving, wait_until
from tests.server.live import small as small
from tests.server.raw import CHAT, chat, get, post
from tests.server.test_head import BAD_FIELDS, BAD_FRAMINGS, BAD_HOSTS, BAD_REQUEST_LINES
from tests.server.test_http import BAD_CHUNKS

SHORT = 0.25  # a deadline that unfinished requests meet
TOGETHER = 60  # connections open at a time
BODY = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}).encode()
REFUSALS = {400, 401, 403, 404, 405, 408, 411, 413, 415, 417, 431, 501, 505}
CLOSED = 0  # stands for a connection that was closed without an answer


@dataclass(frozen=True)
class Case:
    """Bytes to send; the status that the first answer must have, or the statuses that it may have."""

    sent: bytes
    status: int | frozenset[int]

    def allows(self, status):
        return status == self.status if isinstance(self.status, int) else status in self.status


def head(*lines):
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def flawed():
    line = f"POST {CHAT} HTTP/1.1"
    json_lines = ("Content-Type: application/json", f"Content-Length: {len(BODY)}")
    for bad in BAD_REQUEST_LINES:
        if bad:  # an empty line before a request is forgiven
            yield Case(head(bad, "Host: localhost", *json_lines) + BODY, 400)
    for bad in BAD_FIELDS:
        if bad:  # an empty line ends the head
            yield Case(head(line, "Host: localhost", bad, *json_lines) + BODY, 400)
            yield Case(head(line, "Host: localhost", *json_lines, bad) + BODY, 400)
    for bad, status in BAD_FRAMINGS:
        yield Case(head(line, "Host: localhost", "Content-Type: application/json", *bad) + BODY, status)
        yield Case(head("GET /health HTTP/1.1", "Host: localhost", *bad), status)
    for bad in BAD_HOSTS:
        yield Case(head(line, f"Host: {bad}", *json_lines) + BODY, 400)
    for bad in BAD_CHUNKS:
        yield Case(head(line, "Host: localhost", json_lines[0], "Transfer-Encoding: chunked") + bad, 400)
    for bad in BAD_FIELDS:
        if bad:  # an empty line ends the body
            yield Case(head(line, "Host: localhost", json_lines[0], "Transfer-Encoding: chunked") + b"0\r\n"
                       + bad.encode("latin-1") + b"\r\n\r\n", 400)
    for version in ("0.9", "2.0", "3.0"):
        yield Case(head(f"GET /health HTTP/{version}", "Host: localhost"), 505)
    for code in (*range(0x09), *range(0x0a, 0x20), 0x7f):
        yield Case(head(f"GET /health?{chr(code)} HTTP/1.1", "Host: localhost"), 400)
        yield Case(head("GET /health HTTP/1.1", "Host: localhost", f"X: a{chr(code)}b"), 400)
        yield Case(head("GET /health HTTP/1.1", "Host: localhost", f"X{chr(code)}Y: a"), 400)
    yield from other_protocols()
    yield from too_much()


def other_protocols():
    yield Case(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)), 400)  # TLS
    yield Case(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505)
    yield Case(b"SSH-2.0-OpenSSH_9.6\r\n\r\n", 400)
    yield Case(b"EHLO localhost\r\n\r\n", 400)
    yield Case(b"*1\r\n$4\r\nPING\r\n\r\n", 400)  # Redis
    yield Case(b"GET /health\n\n", 400)
    yield Case(b"GET /health\r\n\r\n", 400)  # HTTP/0.9
    yield Case(b"\x05\x01\x00\n", 400)  # SOCKS
    yield Case(b"<?xml version='1.0'?>\n", 400)
    yield Case(BODY + b"\r\n\r\n", 400)
    yield Case(b"\xff\xfeG\x00E\x00T\x00 \x00\n\x00", 400)  # UTF-16


def too_much():
    yield Case(head("GET /" + "a" * 17_000 + " HTTP/1.1", "Host: localhost"), 431)
    yield Case(head("GET / HTTP/1.1", "Host: localhost", "X: " + "a" * 17_000), 431)
    yield Case(head("GET / HTTP/1.1", "Host: localhost", "a" * 17_000 + ": X"), 431)
    yield Case(head("GET / HTTP/1.1", "Host: localhost", *["X: y"] * 200), 431)
    yield Case(b"a" * 40_000, 431)
    yield Case(b"A" * 16_000 + b"\r\n\r\n", 400)  # of a size that is taken
    yield Case(get("/", "Expect: 100-continue", "Content-Length: 99999999", method="POST"), 405)
    for length in ("4194305", "99999999999", "9" * 15, "9" * 100):
        yield Case(get(CHAT, "Content-Type: application/json", f"Content-Length: {length}", method="POST"), 413)
    for size in ("400001", "ffffffff", "7fffffff", "80000000"):
        yield Case(get(CHAT, "Content-Type: application/json", "Transfer-Encoding: chunked", method="POST")
                   + f"{size}\r\n".encode(), 413)


def unfinished():
    """Requests that stop somewhere: late, or gone."""
    for whole in (chat(max_tokens=1), get("/health", "Accept: */*", "X: y")):
        for size in range(0, len(whole), 7):
            yield Case(whole[:size], 408 if size else CLOSED)
    chunked = get(CHAT, "Content-Type: application/json", "Transfer-Encoding: chunked", method="POST")
    chunked += b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
    for size in range(10, len(chunked), 11):
        yield Case(chunked[:size], 408)
    yield Case(b"\r\n" * 10, CLOSED)


def mangled():
    """A byte of a good request put out, put in or changed; and noise."""
    choice = random.Random(4)
    requests = [chat(max_tokens=1), get("/health", "Connection: keep-alive"),
                get("/v1/completions", "Content-Type: application/json", "Transfer-Encoding: chunked", method="POST")
                + b"1e\r\n{\"prompt\":\"a\",\"max_tokens\":1}\r\n0\r\n\r\n"]
    anything = frozenset(REFUSALS | {200, CLOSED})
    for number in range(240):
        whole = requests[number % 3]
        place = choice.randrange(len(whole))
        byte = choice.choice([b"\x00", b"\r", b"\n", b" ", b":", b"\xff", b"\r\n", b"0", b"9", b"\t", b"%", b"/"])
        instead = choice.choice([b"", byte, byte + whole[place:place + 1]])
        yield Case(whole[:place] + instead + whole[place + 1:], anything)
    for size in (1, 2, 3, 10, 100, 1000) * 8:
        yield Case(choice.randbytes(size), frozenset({400, 408, 431, 505}))


FLAWED, UNFINISHED, MANGLED = list(flawed()), list(unfinished()), list(mangled())


def test_there_are_many():
    sent = {case.sent for case in (*FLAWED, *UNFINISHED, *MANGLED)}
    assert len({case.sent for case in FLAWED}) >= 300 and len(sent) >= 600


@pytest.fixture(scope="module")
def served(small):
    with serving(small, limits=dict.fromkeys(("idle_seconds", "head_seconds", "body_seconds"), SHORT)) as served:
        yield served


def statuses(client):
    """Of all answers on a connection that has been read to its end; [CLOSED] if there is none."""
    client.received += client.rest()
    found = []
    while client.received:
        found.append(client.answer().status)
    return [status for status in found if status != 100] or [CLOSED]


@pytest.mark.parametrize("cases", [FLAWED, UNFINISHED, MANGLED], ids=["flawed", "unfinished", "mangled"])
def test_whatever_comes_is_answered_and_harms_nobody(served, cases, caplog):
    wrong = []
    for first in range(0, len(cases), TOGETHER):
        some = [(case, served.open().send(case.sent)) for case in cases[first:first + TOGETHER]]
        for case, client in some:
            found = statuses(client)
            client.close()
            if not case.allows(found[0]) or not REFUSALS.union({200, CLOSED}).issuperset(found):
                wrong.append((case, found))
        assert served.ask(get("/health")).json["status"] == "ready"
    assert not wrong
    assert served.ask(chat(max_tokens=2)).json["usage"]["completion_tokens"] == 2
    wait_until(lambda: served.metric("http_connections") == 0)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def test_a_good_request_is_good(served):
    """Or the cases would be refused for something else."""
    assert served.ask(post(CHAT, BODY)).status == 200
    assert served.ask(head(f"POST {CHAT} HTTP/1.1", "Host: localhost", "Content-Type: application/json",
                           f"Content-Length: {len(BODY)}") + BODY).status == 200
