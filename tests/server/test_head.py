"""server.http.head: what is read of a head, and everything that could be read in two ways refused."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import ApiError
from server.http.head import MAX_FIELDS, parse_field, parse_head, refuse_bare_line_ends


def head(*lines, request="GET / HTTP/1.1", host=True):
    """The bytes of a head without the empty line."""
    lines = [request, *(["Host: localhost"] if host else []), *lines]
    return "\r\n".join(lines).encode("latin-1")


def refused(text):
    with pytest.raises(ApiError) as caught:
        parse_head(text)
    return caught.value


# ---- what is read ----------------------------------------------------------------------------------------


def test_a_head_as_clients_send_it():
    found = parse_head(head("Content-Type: application/json", "Content-Length: 12", "Accept: */*", "ACCEPT:\ta,b \t",
                            "X-Empty:", "X-Latin: \xfcber  uns", request="POST /v1/x%20y%2Fz?a=%20&b HTTP/1.1"))
    assert (found.method, found.path, found.query) == ("POST", "/v1/x y/z", "a=%20&b")
    assert found.is_11 and found.length == 12 and found.has_body and found.keeps_alive
    assert dict(found.fields) == {
        "host": "localhost", "content-type": "application/json", "content-length": "12", "accept": "*/*, a,b",
        "x-empty": "", "x-latin": "\xfcber  uns"}
    assert found.get("accept") == "*/*, a,b" and found.get("cookie") is None


@pytest.mark.parametrize(("target", "path", "query", "host"), [
    ("/", "/", "", "localhost"),
    ("/a?", "/a", "", "localhost"),
    ("/a?b?c#d", "/a", "b?c#d", "localhost"),
    ("//a//", "//a//", "", "localhost"),
    ("/%00%0d%0a%ff", "/\x00\r\n�", "", "localhost"),
    ("/%zz%", "/%zz%", "", "localhost"),
    ("*", "*", "", "localhost"),
    ("http://example.com/a?b", "/a", "b", "example.com"),
    ("HTTPS://example.com:8000", "/", "", "example.com:8000"),
    ("http://example.com?b", "/", "b", "example.com"),
    ("http://[::1]:80/a", "/a", "", "[::1]:80"),
])
def test_targets(target, path, query, host):
    found = parse_head(head(request=f"OPTIONS {target} HTTP/1.1"))
    assert (found.path, found.query, found.get("host")) == (path, query, host)


@pytest.mark.parametrize(("version", "connection", "keeps"), [
    ("1.1", None, True), ("1.1", "keep-alive", True), ("1.1", "Close", False), ("1.1", "x, close ,y", False),
    ("1.1", "keep-alive, close", False), ("1.1", "closed", True), ("1.0", None, False), ("1.0", "Keep-Alive", True),
    ("1.0", "close", False), ("1.9", None, True)])
def test_who_wants_to_go_on(version, connection, keeps):
    lines = [] if connection is None else [f"Connection: {connection}"]
    assert parse_head(head(*lines, request=f"GET / HTTP/{version}")).keeps_alive is keeps
    if len(lines) == 1 and "," in connection:  # in two fields it is the same
        first, *others = connection.split(",")
        assert parse_head(head(f"Connection: {first}", *(f"Connection:{each}" for each in others),
                               request=f"GET / HTTP/{version}")).keeps_alive is keeps


@pytest.mark.parametrize(("lines", "length"), [
    ([], 0), (["Content-Length: 0"], 0), (["Content-Length: 007"], 7), (["Content-Length:\t 999999999999999 "],
                                                                        999_999_999_999_999),
    (["Transfer-Encoding: chunked"], None), (["transfer-encoding:CHUNKED"], None)])
def test_the_length_of_a_body(lines, length):
    found = parse_head(head(*lines))
    assert found.length == length and found.has_body is (length != 0)


@pytest.mark.parametrize(("version", "lines", "expects"), [
    ("1.1", ["Expect: 100-continue", "Content-Length: 1"], True),
    ("1.1", ["Expect: 100-Continue", "Transfer-Encoding: chunked"], True),
    ("1.1", ["Expect: 100-continue"], False),  # for nothing
    ("1.1", ["Content-Length: 1"], False),
    ("1.0", ["Expect: 100-continue", "Content-Length: 1"], False)])  # which 1.0 does not know
def test_who_waits_for_leave(version, lines, expects):
    assert parse_head(head(*lines, request=f"POST / HTTP/{version}")).expects_continue is expects


def test_http_1_0_needs_no_host():
    assert parse_head(b"GET / HTTP/1.0").get("host") is None


def test_every_character_that_may_stand_in_a_name_may():
    name = "!#$%&'*+-.^_`|~09AZaz"
    assert parse_field(f"{name}: x".encode()) == (name.lower(), "x")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]", "[::1]:8000", "a_b.c-d",
                                  "localhost:", "localhost.", "xn--bcher-kva.example", "a%20b"])
def test_hosts(host):
    assert parse_head(head(f"Host: {host}", host=False)).get("host") == host


# ---- what is refused -------------------------------------------------------------------------------------


BAD_REQUEST_LINES = [
    "", " ", "GET", "GET /", "GET / ", "GET / HTTP", "GET / HTTP/", "GET / HTTP/1", "GET / HTTP/1.", "GET / HTTP/1.1 ",
    " GET / HTTP/1.1", "GET  / HTTP/1.1", "GET /  HTTP/1.1", "GET\t/ HTTP/1.1", "GET / HTTP/1.10", "GET / HTTP/01.1",
    "GET / HTTP/1.1.1", "GET / HTTP 1.1", "GET / http/1.1", "GET / HTTP/\xb9.1", "GET / HTTP/x.y", "GET / HTTPS/1.1",
    "GET / FTP/1.1", "GET /a b HTTP/1.1", "GET /\x00 HTTP/1.1", "GET /\x7f HTTP/1.1", "GET /\xe9 HTTP/1.1",
    "GET /\r HTTP/1.1", "G\x00T / HTTP/1.1", "G(T / HTTP/1.1", "G:T / HTTP/1.1", "\xc9 / HTTP/1.1", " / HTTP/1.1",
    "GET  HTTP/1.1", "/ HTTP/1.1", "GET a HTTP/1.1", "GET a/b HTTP/1.1", "GET ?a HTTP/1.1", "GET ** HTTP/1.1",
    "CONNECT localhost:80 HTTP/1.1", "GET ftp://localhost/ HTTP/1.1", "GET http:/localhost HTTP/1.1",
    "GET http:// HTTP/1.1", "GET http:///a HTTP/1.1", "GET http://a@b/ HTTP/1.1", "GET http://a\\b/ HTTP/1.1",
    "GET http://a#b HTTP/1.1", "GET javascript:x HTTP/1.1", "\x16\x03\x01\x02", "HTTP/1.1 200 OK"]


@pytest.mark.parametrize("line", BAD_REQUEST_LINES)
def test_request_lines_that_are_none(line):
    error = refused(head(request=line))
    assert (error.status, error.code) == (400, "malformed_http")


BAD_FIELDS = [
    "", "Name", "Name value", ": value", "Name : value", "Name\t: value", " Name: value", "\tfolded", " folded: so",
    "N\xe4me: x", "Na(me: x", "Na me: x", "Na\x00me: x", "Name: a\x00b", "Name: a\rb", "Name: \r", "Name: a\nb",
    "Name: \x7f", "Name: \x1b[31m", "Name: a\x0bb", "Name\r: x", '"Name": x', "Name=x", "Name;x: y"]


@pytest.mark.parametrize("line", BAD_FIELDS)
def test_fields_that_are_none(line):
    error = refused(head(line, "Accept: x"))
    assert (error.status, error.code) == (400, "malformed_http")
    assert "header field" in error.message


@pytest.mark.parametrize("name", ["Host", "Content-Length", "Transfer-Encoding", "Content-Type", "Authorization",
                                  "Origin", "Expect"])
def test_what_decides_must_stand_once(name):
    value = {"Host": "localhost", "Content-Length": "1", "Expect": "100-continue"}.get(name, "chunked")
    twice = head(f"{name}: {value}", "X: y", f"{name.upper()}: {value}", host=name != "Host")
    error = refused(twice)
    assert error.status == 400 and f"the header field {name.lower()} must stand only once" in error.message


BAD_FRAMINGS = [
    (["Content-Length: "], 400), (["Content-Length: -1"], 400), (["Content-Length: +1"], 400),
    (["Content-Length: 1, 1"], 400), (["Content-Length: 1 1"], 400), (["Content-Length: 0x1"], 400),
    (["Content-Length: 1.0"], 400), (["Content-Length: 1e1"], 400), (["Content-Length: 1_0"], 400),
    (["Content-Length: \xb2"], 400), (["Content-Length: one"], 400), (["Content-Length: 1;"], 400),
    (["Content-Length: 1234567890123456"], 413), (["Content-Length: " + "9" * 5000], 413),
    (["Content-Length: 5", "Transfer-Encoding: chunked"], 400),
    (["Transfer-Encoding: chunked", "Content-Length: 5"], 400),
    (["Transfer-Encoding: identity", "Content-Length: 5"], 400),
    (["Transfer-Encoding: "], 501), (["Transfer-Encoding: gzip"], 501), (["Transfer-Encoding: identity"], 501),
    (["Transfer-Encoding: gzip, chunked"], 501), (["Transfer-Encoding: chunked, gzip"], 501),
    (["Transfer-Encoding: chunked, chunked"], 501), (["Transfer-Encoding: chunked;q=1"], 501),
    (["Transfer-Encoding: xchunked"], 501), (["Transfer-Encoding: chunked\xa0"], 501),
    (["Transfer-Encoding: 'chunked'"], 501), (["Transfer-Encoding: ,chunked"], 501),
    (["Expect: 200-ok"], 417), (["Expect: "], 417), (["Expect: 100-continue, x"], 417)]


@pytest.mark.parametrize(("lines", "status"), BAD_FRAMINGS)
def test_framing_that_is_not_taken(lines, status):
    assert refused(head(*lines, request="POST / HTTP/1.1")).status == status


def test_http_1_0_knows_no_chunks():
    assert refused(head("Transfer-Encoding: chunked", request="POST / HTTP/1.0")).status == 400


@pytest.mark.parametrize("version", ["0.9", "2.0", "3.0", "9.9", "0.0"])
def test_versions(version):
    assert refused(head(request=f"GET / HTTP/{version}")).status == 505


BAD_HOSTS = [
    "", "a b", "a/b", "a,b c", "http://a", "a@b", "a:b", "a:1:2", ":80", "a:123456", "::1", "[::1", "[::1]x",
    "[x]", "[]", "a\\b", "a?b", "a#b", '"a"', "<a>", "\xe9", "a:80:"]


@pytest.mark.parametrize("host", BAD_HOSTS)
def test_hosts_that_are_none(host):
    assert refused(head(f"Host: {host}", host=False)).status == 400
    assert refused(head(f"Host: {host}", host=False, request="GET / HTTP/1.0")).status == 400


def test_http_1_1_needs_a_host_also_with_one_in_the_target():
    assert refused(head(host=False)).status == 400
    assert refused(head(host=False, request="GET http://localhost/ HTTP/1.1")).status == 400


def test_so_many_fields_and_no_more():
    lines = [f"X-{number}: y" for number in range(MAX_FIELDS - 1)]
    assert len(parse_head(head(*lines)).fields) == MAX_FIELDS
    error = refused(head(*lines, "One: more"))
    assert (error.status, error.code) == (431, "headers_too_large")


# ---- line ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("received", "is_good"), [
    (b"", True), (b"a\r\nb\r\n", True), (b"a\r\nb\r", True), (b"\r", True),
    (b"\n", False), (b"a\nb", False), (b"a\rb", False), (b"a\r\rb", False), (b"a\r\r\nb", False), (b"a\n\r\n", False),
    (b"a\r\n\nb", False)])
def test_line_ends(received, is_good):
    for end in range(len(received) + 1):  # as it arrives, byte after byte
        try:
            refuse_bare_line_ends(bytearray(received), max(end - 2, 0), end)
        except ApiError as error:
            assert error.status == 400
            break
    else:
        end = None
    assert (end is None) is is_good


# ---- whatever comes --------------------------------------------------------------------------------------


_SNIPPETS = st.sampled_from([b"GET ", b"/", b" HTTP/1.1", b"\r\n", b"\r", b"\n", b":", b" ", b"Host: a", b"\x00",
                             b"Content-Length: ", b"Transfer-Encoding: chunked", b"1", b"http://", b"%", b"?"])


@given(st.lists(_SNIPPETS | st.binary(max_size=5), max_size=25).map(b"".join))
def test_nothing_but_a_head_or_a_refusal_comes_of_any_bytes(text):
    for whole in (text, b"POST / HTTP/1.1\r\nHost: a\r\n" + text):
        try:
            found = parse_head(whole)
        except ApiError as error:
            assert error.status in (400, 413, 417, 431, 501, 505)
        else:
            # What was understood is what a strict writer would have sent.
            assert b"\n" not in whole.replace(b"\r\n", b"") and b"\r" not in whole.replace(b"\r\n", b"")
            assert found.path.startswith("/") or found.path == "*"
            assert not any(char in value for value in found.fields.values() for char in "\r\n\x00")


@pytest.mark.parametrize("line", [
    b"a:" + b" " * 16000 + b"\x00", b"a:" + b" \t" * 8000 + b"\x7f", b"a:" + b"b " * 8000 + b"\x00",
    b"a" * 16000, b"a:" + b" " * 8000 + b"b" + b" " * 8000 + b"\x01"])
def test_no_field_takes_long_to_refuse(line):
    """An expression that tried every division of the white space took seconds, in which nobody else was served."""
    began = time.process_time()
    assert refused(b"GET / HTTP/1.1\r\nHost: a\r\n" + line).status == 400
    assert time.process_time() - began < 0.5
