"""server.routes over real sockets: what is where, who may ask, and how."""

import json
import re

import pytest

from tests.server.live import NAME, serving
from tests.server.live import small as small
from tests.server.raw import CHAT, chat, get, post

KEYS = ("first-key", "second-key")
BEARER = f"Authorization: Bearer {KEYS[0]}"
PROJECT = f"/project/p-7/genai/{NAME}/v1/chat/completions"
GETS = ("/v1/models", f"/v1/models/{NAME}", "/health", "/ready", "/version", "/metrics", "/openapi.json", "/")
POSTS = {CHAT: {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
         f"{PROJECT}?project_id=7": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
         "/v1/completions": {"prompt": "Hello", "max_tokens": 2}, "/tokenize": {"prompt": "Hello"},
         "/detokenize": {"tokens": [70]}}
OPEN = ("/health", "/ready", "/version", "/")


@pytest.fixture(scope="module")
def served(small):
    with serving(small) as served:
        yield served


@pytest.fixture(scope="module")
def locked(small):
    with serving(small, keys=KEYS) as served:
        yield served


# ---- paths and methods -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", GETS)
def test_what_can_be_got(served, path):
    with served.open() as client:
        answer = client.ask(get(path))
        assert answer.status == 200
        kinds = {"/metrics": "text/plain; version=0.0.4; charset=utf-8", "/": "text/html; charset=utf-8"}
        assert answer.fields["content-type"] == kinds.get(path, "application/json")
        head = client.send(get(path, method="HEAD")).answer(to_head=True)
        assert head.status == 200
        assert head.fields.keys() == answer.fields.keys()
        assert head.fields["content-type"] == answer.fields["content-type"]
        for method in ("POST", "PUT", "PATCH", "DELETE", "TRACE", "get", "X" * 1000):
            refused = client.ask(get(path, "Content-Length: 2", method=method) + b"{}")
            assert (refused.status, refused.code) == (405, "method_not_allowed")
            assert refused.fields["allow"] == "GET, HEAD, OPTIONS" and len(refused.body) < 500


@pytest.mark.parametrize("path", POSTS)
def test_what_can_be_posted(served, path):
    with served.open() as client:
        assert client.ask(post(path, POSTS[path])).status == 200
        for method in ("GET", "PUT", "DELETE"):
            refused = client.ask(post(path, POSTS[path], method=method))
            assert (refused.status, refused.code) == (405, "method_not_allowed")
            assert refused.fields["allow"] == "POST, OPTIONS"
        assert client.send(get(path, method="HEAD")).answer(to_head=True).status == 405
        assert client.ask(post(path, POSTS[path])).status == 200  # on the same connection


@pytest.mark.parametrize("path", [*GETS, *POSTS])
def test_options_say_what_may_be_done(locked, path):
    answer = locked.ask(get(path, method="OPTIONS"))  # also without the key: a browser has none to ask with
    assert answer.status == 204
    assert answer.fields["allow"] == ("POST, OPTIONS" if path in POSTS else "GET, HEAD, OPTIONS")
    assert not any(name.startswith("access-control") for name in answer.fields)


@pytest.mark.parametrize("path", ["/nowhere", "/v1", "/v1/chat", "/v1/models/", "/V1/models", "/health/x", "/%00",
                                  "/v1/../health", "/.", "*", "/v1/chat/completions/x", "/a%0d%0aX-Injected:%20y",
                                  "/project/p-7/genai/v1/chat/completions", "/index.html", "/" + "a" * 9000])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
def test_what_is_not_there(served, path, method):
    with served.open() as client:
        answer = client.send(post(path, b"{}", method=method)).answer(to_head=method == "HEAD")
        if path == "/v1/models/":  # a slash too many is forgiven
            assert answer.status == {"GET": 200, "HEAD": 200, "OPTIONS": 204, "POST": 405}[method]
        elif (method, path) == ("OPTIONS", "*"):
            assert (answer.status, answer.fields["allow"]) == (204, "GET, HEAD, POST, OPTIONS")
        else:
            assert answer.status == 404 and len(answer.body) < 500
            assert method == "HEAD" or answer.code == "not_found"


@pytest.mark.parametrize("path", ["/health/", "//health", "/health//", "///health", "/%68ealth", "/health?x=y&x",
                                  "/health?", "http://localhost/health"])
def test_slashes_and_spellings_are_forgiven(served, path):
    assert served.ask(get(path)).json["status"] == "ready"


def test_doubled_slashes_of_careless_clients(served):
    assert served.ask(chat(path="/v1//chat/completions/", max_tokens=1)).status == 200
    assert served.ask(chat(path=f"/{PROJECT}//?project_id=7", max_tokens=1)).status == 200


def test_a_root_path_is_the_beginning_of_everything(small):
    with serving(small, root_path="/gate/way") as served:
        for path in ("/gate/way/health", "/gate/way//health/", "/gate/way/", "/gate/way", "/gate//way/v1/models"):
            assert served.ask(get(path)).status == 200
        assert served.ask(chat(path=f"/gate/way{PROJECT}?project_id=7", max_tokens=1)).status == 200
        assert served.ask(get("/gate/way/openapi.json")).json["servers"] == [{"url": "/gate/way"}]
        for path in ("/health", "/", "/gate", "/gate/wayhealth", "/gate/ways/health"):
            refused = served.ask(get(path))
            assert (refused.status, refused.code) == (404, "not_found")
            assert "/gate/way" in refused.json["error"]["message"]


# ---- keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*GETS, *POSTS])
@pytest.mark.parametrize("line", [
    None, "Authorization: ", "Authorization: Bearer", "Authorization: Bearer ", "Authorization: Bearer wrong",
    f"Authorization: {KEYS[0]}", f"Authorization: Basic {KEYS[0]}", f"Authorization: Bearer {KEYS[0]}x",
    f"Authorization: Bearer {KEYS[0][:-1]}", f"Authorization: Bearer {KEYS[0]} {KEYS[1]}",
    f"Authorization: Bearer {KEYS[0].upper()}", "Authorization: Bearer \xff\xfe", f"X-Api-Key: {KEYS[0]}"])
def test_no_key_no_answer(locked, path, line):
    fields = [] if line is None else [line]
    with locked.open() as client:
        answer = client.ask(post(path, POSTS[path], *fields) if path in POSTS else get(path, *fields))
        if path in OPEN:
            assert answer.status == 200
        else:
            assert (answer.status, answer.code) == (401, "invalid_api_key")
            assert answer.json["error"]["type"] == "authentication_error"
            assert answer.fields["www-authenticate"] == "Bearer"
        assert client.ask(get("/version")).status == 200  # the body was not taken for a request


@pytest.mark.parametrize("line", [BEARER, f"authorization:bearer {KEYS[1]}", f"Authorization: BEARER   {KEYS[0]} \t"])
def test_any_of_the_keys_will_do(locked, line):
    for path in GETS:
        assert locked.ask(get(path, line)).status == 200
    for path, body in POSTS.items():
        assert locked.ask(post(path, body, line)).status == 200


def test_the_key_salts_the_prefix_cache(locked, served, monkeypatch):
    salts = []
    for one in (locked, served):
        submit = one.supervisor.submit

        def note(requests, submit=submit):
            salts.extend(request.salt for request in requests)
            return submit(requests)

        monkeypatch.setattr(one.supervisor, "submit", note)
    for key in (*KEYS, KEYS[0]):
        assert locked.ask(chat(f"Authorization: Bearer {key}", max_tokens=1)).status == 200
    assert served.ask(chat(BEARER, max_tokens=1)).status == 200  # a key that nobody asked for
    assert salts[0] == salts[2] != salts[1] and salts[3] == ""
    assert all(key not in salt for key in KEYS for salt in salts)


# ---- bodies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [
    None, "", "text/plain", "text/json", "application/jsonp", "application/json-patch+json", "json", "*/*",
    "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/json, text/plain",
    "application/json; charset=latin-1", "application/json; charset=utf-16", "application/json; x=y"])
def test_only_json_is_read(served, kind):
    lines = [] if kind is None else [f"Content-Type: {kind}"]
    for path in POSTS:
        answer = served.ask(get(path, *lines, "Content-Length: 2", method="POST") + b"{}")
        assert (answer.status, answer.code) == (415, "not_json")


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON", "application/json;", "application/json ; ",
                                  "application/json; charset=UTF-8", 'application/json;charset="utf-8"'])
def test_json_may_be_called_so(served, kind):
    body = json.dumps(POSTS["/tokenize"]).encode()
    request = get("/tokenize", f"Content-Type: {kind}", f"Content-Length: {len(body)}", method="POST") + body
    assert served.ask(request).json["count"] == 6


def test_a_post_says_how_long_it_is(served):
    for path in POSTS:
        answer = served.ask(get(path, "Content-Type: application/json", method="POST"))
        assert (answer.status, answer.code) == (411, "length_required")
    in_chunks = get("/tokenize", "Content-Type: application/json", "Transfer-Encoding: chunked", method="POST")
    assert served.ask(in_chunks + b"f\r\n{\"prompt\":\"abc\"\r\n1\r\n}\r\n0\r\n\r\n").status == 200
    empty = served.ask(post("/tokenize", b""))
    assert (empty.status, empty.code) == (400, "invalid_json")


def test_what_cannot_be_read_is_400_and_the_connection_serves_on(served):
    with served.open() as client:
        for body in (b"", b"{", b"[]", b"\xff", b"null", b'{"messages":[]}', b'{"unknown":1}', b"{}" * 10):
            for path in POSTS:
                answer = client.ask(post(path, body))
                assert answer.status == 400 and answer.json["error"]["type"] == "invalid_request_error"


# ---- project_id ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", ["project_id=7", "project_id=%37", "project_id=%2B7", "project_id=007",
                                   "apikey=x&location=y&project_id=7&active_iam=z", "project_id=7&PROJECT_ID=8"])
def test_the_project_is_the_path_s(served, query):
    assert served.ask(chat(path=f"{PROJECT}?{query}", max_tokens=1)).status == 200


@pytest.mark.parametrize(("project", "query"), [
    ("7", ""), ("7", "project_id"), ("7", "project_id="), ("7", "project_id=8"), ("7", "project_id=x"),
    ("7", "project_id=7.0"), ("7", "project_id=-7"), ("7", "project_id=7&project_id=7"), ("7", "project_id=+7"),
    ("7", "project_id=%D9%A7"), ("7", "project_id=7x"), ("7", "project_id=7%00"), ("7", "project_id=1e0"),
    ("7", f"project_id={'7' * 30}"), ("7", "Project_Id=7"), ("7", "x;project_id=7"), ("x", "project_id=7"),
    ("", "project_id=7"), ("7%20", "project_id=7"), ("%D9%A7", "project_id=7"), ("a%0d%0ab", "project_id=7")])
def test_any_other_project_is_400(served, project, query):
    path = f"/project/p-{project}/genai/{NAME}/v1/chat/completions?{query}"
    answer = served.ask(chat(path=path))
    assert (answer.status, answer.json["error"]["param"]) == (400, "project_id")


def test_the_model_in_the_path_must_be_served(small):
    names = ("one", "two", "of/a hub")
    with serving(small, names=names) as served:
        for name, status in (*((name, 200) for name in names), (NAME, 404), ("One", 404), ("a hub", 404)):
            name = name.replace(" ", "%20")
            path = f"/project/p-1/genai/{name}/v1/chat/completions?project_id=1"
            assert served.ask(chat(path=path, max_tokens=1)).status == status
            assert served.ask(get(f"/v1/models/{name}")).status == status
        assert served.ask(chat(path="/project/p-1/genai/two/v1/chat/completions?project_id=1", max_tokens=1,
                               model="two")).json["model"] == "two"


def test_the_model_in_the_path_is_meant_where_the_body_names_none(small):
    with serving(small, names=("one", "two")) as served:
        path = "/project/p-1/genai/two/v1/chat/completions?project_id=1"
        for fields, name in (({}, "two"), ({"model": None}, "two"), ({"model": "one"}, "one")):
            assert served.ask(chat(path=path, max_tokens=1, **fields)).json["model"] == name
        assert served.ask(chat(max_tokens=1)).json["model"] == "one"


# ---- what is answered ------------------------------------------------------------------------------------


def test_the_page_may_do_nothing_but_ask_this_server(served):
    policy = served.ask(get("/")).fields["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "frame-ancestors 'none'" in policy
    assert not re.search(r"https?:|\*", policy)
