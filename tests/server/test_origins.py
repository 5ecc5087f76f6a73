"""server.origins: a web page from elsewhere cannot use the server, unless it is let; anything else can."""

import pytest

from server.errors import ApiError
from server.http.head import parse_head
from server.origins import Origins, is_local
from tests.server.live import serving, wait_until
from tests.server.live import small as small
from tests.server.raw import CHAT, Answer, chat, get


def ask(origins, host="localhost:8000", origin=None, method="GET"):
    """The fields that an answer gets, or the code of the refusal."""
    lines = [f"{method} / HTTP/1.1", f"Host: {host}", *([] if origin is None else [f"Origin: {origin}"])]
    try:
        return dict(origins.check(parse_head("\r\n".join(lines).encode("latin-1"))))
    except ApiError as error:
        assert (error.status, error.type) == (403, "permission_error")
        return error.code


@pytest.mark.parametrize(("host", "local"), [
    ("127.0.0.1", True), ("127.1.2.3", True), ("::1", True), ("localhost", True), ("LocalHost", True),
    ("0.0.0.0", False), ("::", False), ("", False), ("192.168.0.1", False), ("10.0.0.1", False), ("localhost.x", False),
    ("127.0.0.1.nip.io", False), ("2130706433", False), ("0x7f000001", False), ("127.1", False),
    ("example.com", False)])
def test_what_is_local(host, local):
    assert is_local(host) is local


# ---- Host ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]", "[::1]:8000",
                                  "[0:0:0:0:0:0:0:1]:1", "localhost:", "my.name:8000", "MY.NAME"])
def test_local_names_are_answered_to(host):
    assert ask(Origins("127.0.0.1", allowed_hosts=["My.Name"]), host) == {}


@pytest.mark.parametrize("host", [
    "evil.example", "evil.example:8000", "localhost.evil.example", "evil.example.localhost", "127.0.0.1.evil.example",
    "127.0.0.1.nip.io:8000", "[::2]", "[::ffff:1.2.3.4]", "192.168.0.1", "0.0.0.0", "localhost.", "localhost%00",
    "2130706433", "xlocalhost", "not.my.name", "my.name.evil"])
def test_on_a_local_address_no_other_names_are(host):
    """A name of its own that a page has pointed to this machine (DNS rebinding) is such a one."""
    assert ask(Origins("127.0.0.1", allowed_hosts=["my.name"]), host) == "host_not_allowed"
    assert ask(Origins("localhost"), host, method="OPTIONS") == "host_not_allowed"


def test_a_public_address_is_called_as_people_like():
    assert ask(Origins("0.0.0.0"), "evil.example") == ask(Origins("::"), "my.name") == {}


# ---- Origin ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(("origin", "host"), [
    ("http://localhost:8000", "localhost:8000"), ("https://localhost:8000", "localhost:8000"),
    ("http://127.0.0.1", "127.0.0.1"), ("HTTP://LocalHost:8000", "localhost:8000"),
    ("http://[::1]:8000", "[::1]:8000")])
def test_the_server_s_own_page_may_ask(bound, origin, host):
    assert ask(Origins(bound), host, origin) == {}  # and needs no leave to read


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("origin", [
    "http://evil.example", "https://evil.example", "null", "", "http://localhost", "http://localhost:8001",
    "http://127.0.0.1:8000", "localhost:8000", "file://", "http://localhost:8000.evil.example",
    "http://evil.example/localhost:8000", "http://localhost:8000/", "http://a@localhost:8000", "moz-extension://x",
    "http://localhost:8000, http://evil.example", "https://good.example.evil", "http://good.example", "*"])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_pages_from_elsewhere_may_not(bound, origin, method):
    found = Origins(bound, allowed_origins=["https://good.example"])
    assert ask(found, "localhost:8000", origin, method) == "origin_not_allowed"


@pytest.mark.parametrize("allowed", ["https://good.example", "HTTPS://Good.Example/"])
def test_an_allowed_page_may_ask_and_read(allowed):
    origins = Origins("127.0.0.1", allowed_origins=["http://other.example", allowed])
    assert ask(origins, origin="https://good.example") == {
        "Access-Control-Allow-Origin": "https://good.example", "Vary": "Origin",
        "Access-Control-Expose-Headers": "X-Request-Id, Retry-After"}
    preflight = ask(origins, origin="https://good.example", method="OPTIONS")
    assert preflight["Access-Control-Allow-Methods"] == "GET, HEAD, POST, OPTIONS"
    assert preflight["Access-Control-Allow-Headers"] == "Authorization, *"  # of which * does not cover the first
    assert "Access-Control-Allow-Credentials" not in preflight
    assert ask(origins, "evil.example", "https://good.example") == "host_not_allowed"


def test_all_pages_may_be_allowed():
    origins = Origins("127.0.0.1", allowed_origins=["*"])
    for origin in ("https://any.example", "null", "http://localhost:1"):
        assert ask(origins, origin=origin)["Access-Control-Allow-Origin"] == "*"
    assert ask(origins, origin="http://localhost:8000") == {}


# ---- over the wire ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(small):
    with serving(small, keys=("key",), allowed_origins=("https://good.example",)) as served:
        yield served


GOOD = "Origin: https://good.example"


def cors(answer: Answer):
    return {name for name in answer.fields if name.startswith("access-control-")}


def test_an_allowed_page_can_read_every_answer_also_refusals(served):
    key = "Authorization: Bearer key"
    requests = {chat(GOOD, key, max_tokens=1): 200, chat(GOOD, key, max_tokens=1, stream=True): 200, chat(GOOD): 401,
                get("/nowhere", GOOD): 404, get(CHAT, GOOD): 405, chat(GOOD, key, temperature=9): 400,
                get("/health", GOOD): 200, get("/", GOOD): 200}
    for request, status in requests.items():
        answer = served.ask(request)
        assert answer.status == status
        assert answer.fields["access-control-allow-origin"] == "https://good.example"
        assert answer.fields["vary"] == "Origin"


def test_a_preflight_needs_no_key(served):
    answer = served.ask(get(CHAT, GOOD, "Access-Control-Request-Method: POST",
                            "Access-Control-Request-Headers: authorization,content-type", method="OPTIONS"))
    assert answer.status == 204 and "access-control-allow-methods" in answer.fields


@pytest.mark.parametrize("line", ["Origin: https://evil.example", "Origin: null", "Origin: "])
def test_a_page_from_elsewhere_gets_nothing(served, line):
    wait_until(lambda: served.metric("http_connections") == 0)  # all that was answered has been counted
    submitted = served.metric("request_success_total")
    for request in (chat(line, "Authorization: Bearer key"), get("/health", line), get(CHAT, line, method="OPTIONS"),
                    get("/", line), get("/nowhere", line)):
        answer = served.ask(request)
        assert (answer.status, answer.code) == (403, "origin_not_allowed") and not cors(answer)
    assert served.metric("request_success_total") == submitted


def test_a_rebound_name_gets_nothing(served):
    for request in (b"GET / HTTP/1.1\r\nHost: evil.example:%d\r\n\r\n" % served.port,
                    b"GET http://evil.example/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
                    b"GET /health HTTP/1.0\r\nHost: evil.example\r\n\r\n"):
        answer = served.ask(request)
        assert (answer.status, answer.code) == (403, "host_not_allowed") and not cors(answer)


def test_whoever_is_no_page_is_not_concerned(served):
    assert not cors(served.ask(get("/health")))
    assert served.ask(b"GET /health HTTP/1.0\r\n\r\n").status == 200
