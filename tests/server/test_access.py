"""server.access: a line for each answer, with what it cost and never what it said."""

import json
import logging
import re

import pytest

from server.access import Entry, JsonFormatter, LineFormatter
from tests.server.live import serving, wait_until
from tests.server.live import small as small
from tests.server.raw import chat, get, post

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"


@pytest.fixture
def records(monkeypatch):
    """What is written from now on."""
    class Keep(logging.Handler):
        def emit(self, record):
            found.append(record)

    found, logger = [], logging.getLogger("llama.access")
    monkeypatch.setattr(logger, "handlers", [Keep()])
    for name, value in (("disabled", False), ("propagate", False), ("level", logging.INFO)):
        monkeypatch.setattr(logger, name, value)
    logger.manager._clear_cache()
    return found


def test_a_line_for_people(records):
    entry = Entry("POST", "/v1/chat/completions", "127.0.0.1", "chat-1", 22, 16, 5, 0.0123, 1.5)
    entry.began -= 2
    entry.write(200)
    line = LineFormatter().format(records[0])
    assert re.fullmatch(TIME + r" id=chat-1 peer=127\.0\.0\.1 method=POST route=/v1/chat/completions status=200 "
                        r"prompt_tokens=22 cached_tokens=16 completion_tokens=5 queue_ms=12\.3 "
                        r"first_token_ms=1500\.0 total_ms=2\d{3}\.\d", line)


def test_a_line_for_machines(records):
    Entry("GET", "/health", "::1").write(None)
    facts = json.loads(JsonFormatter().format(records[0]))
    assert re.fullmatch(TIME, facts.pop("time")) and facts.pop("total_ms") >= 0
    assert facts == {"level": "info", "peer": "::1", "method": "GET", "route": "/health", "status": 499}


@pytest.mark.parametrize("formatter", [LineFormatter(), JsonFormatter()])
def test_what_is_no_answer_is_written_too(formatter):
    logger = logging.getLogger("test")
    try:
        raise ZeroDivisionError("a defect")
    except ZeroDivisionError as error:
        record = logger.makeRecord("test", logging.ERROR, "f", 1, "in %s", ("this",), (type(error), error, None))
    text = formatter.format(record)
    assert "in this" in text and "ZeroDivisionError: a defect" in text
    if isinstance(formatter, JsonFormatter):
        assert "\n" not in text and json.loads(text)["level"] == "error"


@pytest.fixture(scope="module")
def served(small):
    with serving(small, engine={"pace": 0.001}) as served:
        yield served


@pytest.fixture
def facts(served, records):
    """Has requests made, and says what was written of them."""
    def of(*requests, leave=False):
        records.clear()
        with served.open() as client:
            for request in requests:
                client.send(request)
                if not leave:
                    client.answer()
        count = 1 if leave else len(requests)
        wait_until(lambda: len(records) >= count)
        assert [record.levelno for record in records] == [logging.INFO] * count
        return [record.facts for record in records]

    return of


def test_what_a_chat_cost(facts):
    for stream in (False, True):
        [written] = facts(chat(max_tokens=4, stream=stream))
        times = [written.pop(name) for name in ("queue_ms", "first_token_ms", "total_ms")]
        assert 0 <= times[0] <= times[1] <= times[2]
        assert re.fullmatch("chat-[0-9a-f]{32}", written.pop("id"))
        assert written == {"peer": "127.0.0.1", "method": "POST", "route": "/v1/chat/completions", "status": 200,
                           "prompt_tokens": 22, "cached_tokens": 0, "completion_tokens": 4}


def test_all_else_has_a_line_too(facts):
    written = facts(get("/health"), get("/nowhere"), get("/v1/models/secret"), post("/tokenize", b"{"),
                    get("/v1/chat/completions", method="M" * 1000), chat(max_tokens=0))
    assert [(each["method"][:4], each["route"], each["status"]) for each in written] == [
        ("GET", "/health", 200), ("GET", "unknown", 404), ("GET", "/v1/models/{id}", 404), ("POST", "/tokenize", 400),
        ("MMMM", "/v1/chat/completions", 405), ("POST", "/v1/chat/completions", 400)]
    assert max(len(each["method"]) for each in written) == 32
    [written] = facts(b"GET /secret HTTP/9.9\r\n\r\n")
    assert (written["method"], written["route"], written["status"]) == ("-", "unknown", 505)


def test_a_client_that_left_has_a_line(facts):
    [written] = facts(chat(max_tokens=8000), leave=True)
    assert written["status"] == 499


def test_no_line_says_what_was_said(facts, served, records):
    secret = "a-secret-of-mine"
    facts(post("/v1/completions", {"prompt": secret, "max_tokens": 30, "user": secret}, "X-Secret: " + secret),
          get(f"/v1/models/{secret}?{secret}"), get(f"/{secret}", f"Authorization: Bearer {secret}"),
          post(f"/tokenize?{secret}", {"prompt": secret, "unknown": secret}))
    assert len(records) == 4
    for record in records:
        for formatter in (LineFormatter(), JsonFormatter()):
            line = formatter.format(record)
            assert secret not in line and "abcde" not in line


def test_labels_are_not_made_by_clients(served):
    wait_until(lambda: served.metric("http_connections") == 0)
    before = served.metric("http_responses_total")
    for number in range(3):
        assert served.ask(get(f"/{number}", method=f"M{number}")).status == 404
    wait_until(lambda: served.metric("http_responses_total") == before + 3)  # it is counted after the answer
    assert served.metric("http_responses_total", method="other", route="unknown", status="404") >= 3
    lines = served.front.routes._metrics.render(served.supervisor.snapshot())
    assert '"M0"' not in lines and '"/0"' not in lines
