"""server.http over real sockets: where a request begins and ends, how large it may be, how long it may take."""

import socket
import time

import pytest

from server.http.transport import ClientGoneError
from tests.server.live import listening, tell, wait_until
from tests.server.raw import PATIENCE, get, post

SHORT = 0.15  # a deadline to be waited for; the others are not met here
KIB = 1024


def in_chunks(body, path="/chunks", trailer=b"\r\n"):
    """A POST whose body is in chunks already, but for its end."""
    return get(path, "Transfer-Encoding: chunked", method="POST") + body + (b"0\r\n" + trailer if trailer else b"")


def seen(answer):
    """What the handler understood."""
    assert answer.status == 200
    return answer.json["path"], answer.json["body"]


@pytest.fixture(scope="module")
def site():
    with listening() as site:
        yield site


# ---- one request after another ---------------------------------------------------------------------------


def test_a_connection_serves_one_request_after_another(site):
    with site.open() as client:
        for number in range(5):
            answer = client.ask(post(f"/{number}", b"x" * number))
            assert seen(answer) == (f"/{number}", "x" * number)
            assert "connection" not in answer.fields and {"date", "server"} <= answer.fields.keys()


def test_requests_sent_ahead_are_answered_in_order(site):
    with site.open() as client:
        client.send(post("/1", b"one") + b"\r\n\r\n" + get("/2") + in_chunks(b"5\r\nthree\r\n") + get("/4")[:-7])
        assert [seen(client.answer()) for _ in range(3)] == [("/1", "one"), ("/2", ""), ("/chunks", "three")]
        assert seen(client.ask(get("/4")[-7:])) == ("/4", "")


def test_a_request_may_come_byte_by_byte(site):
    request = b"\r\n" + in_chunks(b"3;a=b\r\nabc\r\n0A\r\n0123456789\r\n", trailer=b"X: y\r\n\r\n")
    with site.open() as client:
        client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in request:
            client.send(bytes([byte]))
        assert seen(client.answer()) == ("/chunks", "abc0123456789")
        assert seen(client.ask(get("/next"))) == ("/next", "")


@pytest.mark.parametrize(("version", "fields", "stays"), [
    ("1.1", [], True), ("1.1", ["Connection: close"], False), ("1.0", [], False),
    ("1.0", ["Connection: keep-alive"], True)])
def test_who_closes(site, version, fields, stays):
    with site.open() as client:
        answer = client.ask(get("/", *fields, version=version))
        assert answer.fields.get("connection") == {("1.1", True): None, ("1.0", True): "keep-alive"}.get(
            (version, stays), "close")
        if stays:
            assert seen(client.ask(get("/again"))) == ("/again", "")
        else:
            assert client.rest() == b""


def test_the_answer_to_head_has_no_body(site):
    with site.open() as client:
        head = client.send(get("/h", method="HEAD")).answer(to_head=True)
        assert head.status == 200 and int(head.fields["content-length"]) > 10
        assert seen(client.ask(get("/g"))) == ("/g", "")


def test_no_content_has_none():
    with listening(lambda exchange: exchange.answer(204, b"", "", [("Allow", "GET")])) as site, site.open() as client:
        for _ in range(2):
            answer = client.ask(get("/"))
            assert answer.status == 204 and answer.fields["allow"] == "GET"
            assert not {"content-length", "content-type", "transfer-encoding"} & answer.fields.keys()


# ---- bodies in chunks ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunks", "trailer", "body"), [
    (b"", b"\r\n", ""),
    (b"1\r\na\r\n1\r\nb\r\n", b"\r\n", "ab"),
    (b"00000003\r\nabc\r\n", b"\r\n", "abc"),
    (b"3;name=value;other=\"x\"\r\nabc\r\n", b"\r\n", "abc"),
    (b"3 \t;name\r\nabc\r\n", b"\r\n", "abc"),
    (b"c\r\n0\r\n\r\nGET / H\r\n", b"\r\n", "0\r\n\r\nGET / H"),
    (b"A\r\n0123456789\r\na\r\n0123456789\r\n", b"\r\n", "0123456789" * 2),
    (b"3\r\nabc\r\n", b"X-One: 1\r\nContent-Length: 99\r\n\r\n", "abc")])
def test_chunks_are_joined(site, chunks, trailer, body):
    with site.open() as client:
        assert seen(client.ask(in_chunks(chunks, trailer=trailer))) == ("/chunks", body)
        assert seen(client.ask(get("/next"))) == ("/next", "")


BAD_CHUNKS = [
    b"\r\n", b"g\r\n", b"-1\r\na\r\n", b"+1\r\na\r\n", b"0x1\r\na\r\n", b" 1\r\na\r\n", b"1 \r\na\r\n", b"1\t\r\na\r\n",
    b"1_0\r\na\r\n", b"\xb2\r\naa\r\n", b"1,1\r\na\r\n", b"000000001\r\na\r\n", b"1\na\r\n", b"1\ra\r\n", b"1\r\r\na",
    b"1\r\na\n0", b"1\r\nab\r\n", b"2\r\na\r\n0\r\n\r\n", b"1\r\na0\r\n\r\n", b"1;\x00\r\na\r\n", b"1;a\nb\r\na\r\n",
    b"1;a\rb\r\na\r\n", b"1;\x7f\r\na", b"1" + b";a" * 200 + b"\r\na\r\n", b"1;" + b"a" * 9999, b"\x00\r\n", b"\n",
    b"0\n\n", b"0\r\n\n", b"0\r\nX\r\n\r\n", b"0\r\n: x\r\n\r\n", b"0\r\nX : y\r\n\r\n", b"0\r\n X: y\r\n\r\n",
    b"0\r\nX: \x00\r\n\r\n", b"0\r\nX: y\nZ: z\r\n\r\n", b"0\r\nX: y\rZ\r\n\r\n", b"0\r\nGET / HTTP/1.1\r\n\r\n",
    b"0\r\nX: " + b"y" * 9000 + b"\r\n\r\n", b"0\r\n" + b"X: yy\r\n" * 2000 + b"\r\n"]


@pytest.mark.parametrize("rest", BAD_CHUNKS)
def test_chunks_that_are_none(site, rest):
    with site.open() as client:
        answer = client.ask(in_chunks(rest, trailer=b""))
        assert (answer.status, answer.code, answer.fields["connection"]) == (400, "malformed_http", "close")
        assert client.rest() == b""


SMUGGLED = get("/smuggled")


@pytest.mark.parametrize("request_bytes", [
    get("/", "Content-Length: 5", "Transfer-Encoding: chunked", method="POST") + b"0\r\n\r\n",
    get("/", "Transfer-Encoding: chunked", "Content-Length: 5", method="POST") + b"0\r\n\r\n",
    get("/", "Content-Length: 0", "Content-Length: 44", method="POST"),
    get("/", "Content-Length: 0, 44", method="POST"),
    get("/", "Transfer-Encoding: chunked", "Transfer-Encoding: identity", method="POST") + b"0\r\n\r\n",
    get("/", "Transfer-Encoding: identity", method="POST"),
    get("/", "Transfer-Encoding: x", method="POST") + b"0\r\n\r\n",
    get("/", "Transfer-Encoding : chunked", method="POST") + b"0\r\n\r\n",
    get("/", "Transfer-Encoding: chunked", method="POST", version="1.0") + b"0\r\n\r\n",
    get("/", "X: y\nContent-Length: 44", method="POST"),
    get("/", "X: y", "\tContent-Length: 44", method="POST"),
    in_chunks(b"", trailer=b"\n"),
    in_chunks(b"1\r\nab\r\n"),
    get("/", "Expect: 200-ok", "Content-Length: 44", method="POST")])
def test_what_two_readers_might_read_differently_ends_the_connection(request_bytes):
    served = []

    def note(exchange):
        served.append(exchange.head.path)
        tell(exchange)

    with listening(note) as site, site.open() as client:
        answer = client.ask(request_bytes + SMUGGLED)
        assert answer.status in (400, 417, 501) and answer.fields["connection"] == "close"
        assert client.rest() == b""
    assert "/smuggled" not in served


# ---- limits ----------------------------------------------------------------------------------------------


def test_a_head_may_have_16_kib(site):
    size = 16 * KIB
    rest = len(get("/", "X: ")) - len("\r\n\r\n")
    with site.open() as client:
        assert client.ask(get("/", "X: " + "y" * (size - rest))).status == 200
        answer = client.ask(get("/", "X: " + "y" * (size - rest + 1)))
        assert (answer.status, answer.code) == (431, "headers_too_large")
        assert client.rest() == b""


def test_a_head_without_end_is_refused_at_once(site):
    with site.open() as client:
        assert client.ask(b"GET /" + b"a" * 17 * KIB).status == 431  # and not after head_seconds


def test_a_body_may_have_4_mib(site):
    most = 4 * KIB * KIB
    with site.open() as client:
        assert len(seen(client.ask(post("/", b"x" * most)))[1]) == most
        chunks = (b"%x\r\n" % (most // 4) + b"y" * (most // 4) + b"\r\n") * 4
        assert len(seen(client.ask(in_chunks(chunks)))[1]) == most
        # What is too much is refused before it is there.
        answer = client.ask(get("/", f"Content-Length: {most + 1}", method="POST"))
        assert (answer.status, answer.code, answer.fields["connection"]) == (413, "body_too_large", "close")
        assert client.rest() == b""
    with site.open() as client:
        assert client.ask(in_chunks(chunks + b"1\r\n", trailer=b"")).status == 413
        assert client.rest() == b""
    assert site.ask(in_chunks(b"ffffffff\r\n", trailer=b"")).status == 413


def test_a_refusal_reaches_a_client_that_is_still_sending(site):
    most = 4 * KIB * KIB
    with site.open() as client:
        answer = client.ask(post("/", b"x" * (most + 1)))
        assert answer.status == 413 and client.rest() == b""  # not a reset


def test_leave_to_send_comes_after_the_limits_and_the_route():
    def choose(exchange):
        if exchange.head.path == "/no":
            exchange.answer(401, b"{}", "application/json")
        else:
            tell(exchange)

    with listening(choose, body=10) as site:
        for field, body in (("Content-Length: 3", b"abc"), ("Transfer-Encoding: chunked", b"3\r\nabc\r\n0\r\n\r\n")):
            with site.open() as client:
                assert client.ask(get("/", "Expect: 100-continue", field, method="POST")).status == 100
                assert seen(client.ask(body)) == ("/", "abc")
                assert seen(client.ask(get("/next"))) == ("/next", "")
        for path, length, status in (("/", 11, 413), ("/no", 3, 401), ("/no", 11, 401)):
            with site.open() as client:
                answer = client.ask(get(path, "Expect: 100-continue", f"Content-Length: {length}", method="POST"))
                assert (answer.status, answer.fields["connection"]) == (status, "close")
                assert client.rest() == b""


def test_a_body_that_nobody_read_is_not_taken_for_a_request():
    with listening(lambda exchange: exchange.answer(404, b"{}", "application/json")) as site:
        for length in (1, 64 * KIB):
            with site.open() as client:
                inside = get("/inside").ljust(length)[:length]
                assert "connection" not in client.ask(post("/", inside) + get("/next")).fields
                assert client.answer().status == 404
        for request in (post("/", get("/inside").ljust(64 * KIB + 1)), in_chunks(b"1\r\na\r\n")):
            with site.open() as client:
                assert client.ask(request).fields["connection"] == "close"  # more than is worth reading
                assert client.rest() == b""


# ---- deadlines -------------------------------------------------------------------------------------------


def drip(client, byte):
    """Send a byte now and then until the server has had enough."""
    deadline = time.monotonic() + PATIENCE
    client.socket.settimeout(SHORT / 10)
    while time.monotonic() < deadline:
        try:
            client.send(byte)
            if client._receive():
                break
        except TimeoutError:
            pass
    else:
        raise AssertionError("it never had enough")
    client.socket.settimeout(PATIENCE)
    return client.answer()


@pytest.mark.parametrize("is_dripping", [False, True])
@pytest.mark.parametrize(("begin", "byte", "limit"), [
    (b"G", b"E", "head_seconds"),
    (get("/")[:-2] + b"X: ", b"y", "head_seconds"),
    (post("/", b"12345")[:-4], None, "body_seconds"),
    (get("/", "Content-Length: 9999", method="POST"), b"x", "body_seconds"),
    (in_chunks(b"fff\r\n", trailer=b""), b"x", "body_seconds"),
    (in_chunks(b"1;", trailer=b""), b"x", "body_seconds"),
    (in_chunks(b"0\r\nX: ", trailer=b""), b"y", "body_seconds")])
def test_what_comes_too_slowly_is_408(begin, byte, limit, is_dripping):
    with listening(**{limit: SHORT}) as site, site.open() as client:
        client.send(begin)
        answer = drip(client, byte) if is_dripping and byte else client.answer()
        assert (answer.status, answer.code, answer.fields["connection"]) == (408, "timeout", "close")
        assert client.rest() == b""


@pytest.mark.parametrize("begin", [b"", get("/"), b"\r\n" * 3])
def test_a_connection_without_a_request_is_closed(begin):
    with listening(idle_seconds=SHORT, head_seconds=SHORT) as site, site.open() as client:
        client.send(begin)
        if begin == get("/"):
            assert client.answer().status == 200
        assert client.rest() == b""


def test_an_unread_body_that_does_not_come_is_not_waited_for():
    with listening(lambda exchange: exchange.answer(404, b"{}", "application/json"), head_seconds=SHORT) as site:
        with site.open() as client:
            assert client.ask(post("/", b"12345")[:-1]).status == 404
            assert client.rest() == b""


def test_a_client_that_does_not_read_its_answer_is_given_up():
    ends = []

    def much(exchange):
        try:
            exchange.answer(200, b"x" * 32 * KIB * KIB, "text/plain")
        except ClientGoneError as error:
            ends.append(str(error))
            raise

    with listening(much, stall_seconds=SHORT) as site, site.open(room=4 * KIB) as client:
        client.send(get("/"))
        wait_until(lambda: ends)
        assert ends == ["it has stopped reading"]
        wait_until(lambda: site.connections == 0)


def test_a_client_that_reads_slowly_but_reads_gets_its_answer():
    size = 2 * KIB * KIB
    with listening(lambda exchange: exchange.answer(200, b"x" * size, "text/plain")) as site:
        with site.open(room=4 * KIB) as client:
            client.send(get("/", "Connection: close"))
            received = 0
            while data := client.socket.recv(16 * KIB):
                received += len(data)
            assert received > size
