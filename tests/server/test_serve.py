"""`llama serve`: what its flags come to, what it refuses to start with, and how it ends."""

import argparse
import ctypes
import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys

import pytest

from server import serve
from server.flags import KEY_VARIABLE, add_flags
from server.front import Front
from server.http import HttpLimits
from tests.server.clients import ROOT
from tests.server.live import listening
from tests.server.live import small as small
from tests.server.raw import PATIENCE, chat, get
from tests.server.scripted import spec
from tests.server.scripted_http import MODULE, scripted

NAME = "llama3_1_8b_instruct"


def parse(*flags):
    parser = argparse.ArgumentParser(prog="serve")
    add_flags(parser)
    parser.add_argument("--debug", action="store_true")
    return parser.parse_args([str(flag) for flag in flags])


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs it here: run(*flags) -> its exit status and its one line of error. What it sets is set back."""
    monkeypatch.setattr(serve, "_set_up_log", lambda args: None)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*flags):
        code = serve.run(parse(*flags))
        error = capsys.readouterr().err
        assert error.startswith("llama: error: ") and error.count("\n") == 1
        return code, error.removeprefix("llama: error: ").rstrip("\n")

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def settings(run, monkeypatch):
    """What the flags come to: settings(*flags). Nothing is served."""
    made = []

    def no_front(settings, on_state):
        made.append(settings)
        raise OSError(errno.EADDRINUSE, "a test wants nothing served")

    def settings(*flags):
        monkeypatch.setattr(serve, "Front", no_front)
        assert run(*flags)[0] == 1
        return made.pop()

    return settings


# ---- flags -----------------------------------------------------------------------------------------------


def test_defaults(settings):
    found = settings()
    assert (found.host, found.port, found.names, found.root_path) == ("127.0.0.1", 8000, (NAME,), "")
    assert found.keys == found.allowed_hosts == found.allowed_origins == ()
    assert found.limits == HttpLimits() and found.heartbeat_seconds == 5
    assert found.spec.model is None and found.max_context is None and found.spec.threads is None
    assert (found.spec.max_queued_requests, found.spec.max_queued_tokens) == (1024, 4_000_000)


def test_every_flag_arrives(settings, tmp_path):
    found = settings(
        "--host", "::1", "--port", 0, "--root-path", "gate/way/", "--served-model-name", "a", "--served-model-name",
        "b", "--served-model-name", "a", "--allow-origin", "https://x", "--allow-origin", "https://y", "--allow-host",
        "z", "--max-connections", 7, "--max-running", 8, "--max-queued", 9, "--max-queued-tokens", 10,
        "--heartbeat-seconds", "0.5", "--model", tmp_path, "--context", 11, "--threads", 12)
    assert (found.host, found.port, found.names, found.root_path) == ("::1", 0, ("a", "b"), "/gate/way")
    assert found.allowed_origins == ("https://x", "https://y") and found.allowed_hosts == ("z",)
    assert found.limits == HttpLimits(connections=7) and found.heartbeat_seconds == 0.5
    assert found.spec.options["limits"] == {"max_running": 8}
    assert (found.spec.max_queued_requests, found.spec.max_queued_tokens) == (9, 10)
    assert (found.spec.model, found.max_context, found.spec.threads) == (str(tmp_path), 11, 12)


@pytest.mark.parametrize("flags", [("--port", "65536"), ("--port", "-1"), ("--port", "http"),
                                   ("--heartbeat-seconds", "nan"), ("--drain-seconds", "-1"),
                                   ("--drain-seconds", "inf"), ("--max-connections", "0"), ("--log-format", "xml"),
                                   ("--heartbeat-seconds", "0"), ("--root-path", "/a?b"), ("--root-path", "a b"),
                                   ("--root-path", "/%61"), *(("--served-model-name", name) for name in (
                                       "", "/a", "a/", "a//b", "a\n", "x" * 257))])
def test_flags_that_mean_nothing_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*flags)
    assert caught.value.code == 2 and f"argument {flags[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize(("text", "path"), [("", ""), ("/", ""), ("a", "/a"), ("//a//b-1//", "/a/b-1")])
def test_a_root_path_is_brought_into_form(text, path):
    assert parse("--root-path", text).root_path == path


# ---- keys ------------------------------------------------------------------------------------------------


def test_keys_come_from_flags_environment_and_file(settings, monkeypatch, tmp_path):
    file = tmp_path / "keys"
    file.write_text("file-1\n\n  file-2  \r\nfile-3")
    monkeypatch.setenv(KEY_VARIABLE, "env-1,env-2,")
    assert set(settings().keys) == {"env-1", "env-2"}
    found = settings("--api-key", "flag-1", "--api-key", "flag-2", "--api-key-file", file)
    assert set(found.keys) == {"flag-1", "flag-2", "env-1", "env-2", "file-1", "file-2", "file-3"}


@pytest.mark.parametrize("key", ["", " ", "two words", "schl\xfcssel", "line\nend", "\x7f", "tab\t"])
def test_keys_that_could_not_be_sent_are_refused(run, key, monkeypatch):
    assert run("--api-key", key) == (1, "an API key must be printable ASCII without spaces, and not empty")
    if key:
        monkeypatch.setenv(KEY_VARIABLE, f"good,{key}")
        assert run()[0] == 1


def test_a_key_file_must_be_there_and_have_keys(run, tmp_path):
    file = tmp_path / "keys"
    for content, words in ((None, "cannot be read"), (b"\n \n", "has no key in it"), (b"\xff", "cannot be read")):
        if content is not None:
            file.write_bytes(content)
        code, error = run("--api-key-file", file)
        assert code == 1 and error.startswith(f"--api-key-file {file} {words}")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", "127.0.0.1.nip.io"])
def test_a_public_address_needs_a_key(run, settings, host, monkeypatch, tmp_path):
    assert run("--host", host) == (1, f"{host} can be reached from elsewhere, and there is no API key; give "
                                   "--api-key, --api-key-file or --allow-anonymous")
    file = tmp_path / "keys"
    file.write_text("key")
    for flags in (("--api-key", "key"), ("--api-key-file", file), ("--allow-anonymous",)):
        assert settings("--host", host, *flags).host == host
    monkeypatch.setenv(KEY_VARIABLE, "key")
    assert settings("--host", host).keys == ("key",)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_a_local_address_needs_none(settings, host):
    assert settings("--host", host).keys == ()


# ---- what cannot be served -------------------------------------------------------------------------------


def test_a_port_in_use(run):
    with listening() as site:
        code, error = run("--port", site.port)
    assert code == 1 and error.startswith(f"cannot listen on 127.0.0.1, port {site.port}: Address already in use")


def test_an_address_that_is_none(run):
    code, error = run("--host", "no.such.host.invalid", "--api-key", "x", "--port", 0)
    assert code == 1 and error.startswith("cannot listen on no.such.host.invalid, port 0: ")


def test_a_model_that_is_none(run, tmp_path):
    assert run("--port", 0, "--model", "no such") == (
        1, "'no such' is no directory here, and no hub id such as meta-llama/Llama-3.1-8B-Instruct")
    code, error = run("--port", 0, "--model", tmp_path)
    assert code == 1 and error.startswith(f"{tmp_path} holds neither config.json nor params.json")


def test_an_engine_that_cannot_load(run, monkeypatch, small):
    monkeypatch.setattr(serve, "EngineSpec", lambda model, options, threads, **rest: spec(
        model=model, load_error="model.safetensors is too short", **rest))
    assert run("--port", 0, "--model", small) == (1, "model.safetensors is too short")


def test_the_log_is_set_up_once_and_quietly(monkeypatch):
    loggers = [logging.getLogger(name) for name in ("llama", "llama.access")]
    before = [(logger, logger.handlers, logger.propagate, logger.level, logger.disabled) for logger in loggers]
    try:
        for _ in range(2):
            serve._set_up_log(parse("--no-access-log"))
        assert len(loggers[0].handlers) == 1 and not loggers[0].propagate and loggers[1].disabled
        serve._set_up_log(parse())
        assert not loggers[1].disabled
    finally:
        for logger, handlers, propagate, level, disabled in before:
            logger.handlers, logger.propagate, logger.level, logger.disabled = handlers, propagate, level, disabled


# ---- processes -------------------------------------------------------------------------------------------


def test_from_start_to_end_with_a_log_for_machines():
    with scripted("--log-format", "json", "--api-key", "a-key", pace=0.005) as server:
        assert re.search(rf"^ready: demo \(scripted\), served as {NAME}; context [\d,]+ tokens$", server.printed, re.M)
        assert f"POST {server.url}/project/p-1/genai/{NAME}/v1/chat/completions?project_id=1" in server.printed
        assert f"curl {server.url}/v1/chat/completions" in server.printed and "a-key" not in server.printed
        with server.open(get("/ready")) as idle, server.open() as running:
            assert idle.answer().status == 200
            running.send(chat("Authorization: Bearer a-key", max_tokens=100, seed=1)).socket.settimeout(PATIENCE)
            server.wait_for(lambda: idle.ask(get("/health")).json["engine"]["running"] == 1)
            server.process.send_signal(signal.SIGTERM)
            server.wait_for(lambda: server.get("/ready").status == 503)
            answer = running.answer()
            assert answer.status == 200 and answer.json["usage"]["completion_tokens"] == 100
        assert server.process.wait(PATIENCE) == 0
        written = [json.loads(line) for line in server.log.splitlines()]
        [finished] = [each for each in written if each.get("route") == "/v1/chat/completions"]
        assert (finished["status"], finished["completion_tokens"], finished["id"]) == (200, 100, answer.json["id"])
        [stopping] = [each for each in written if "route" not in each]
        assert (stopping["level"], stopping["message"]) == ("warning", "draining: the server is stopping")


def test_a_second_signal_ends_it_at_once_with_a_log_for_people():
    with scripted("--drain-seconds", "600", pace=0.005) as server, server.open(chat(stream=True, seed=1)) as client:
        client.head()
        client.chunk()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for(lambda: server.get("/ready").status == 503)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE) == 0
        received = client.rest()
        assert b'"code":"engine_lost"' in received and b"[DONE]" not in received
        assert re.search(r"^\S+Z id=chat-\w+ peer=127.0.0.1 method=POST route=/v1/chat/completions status=200 ",
                         server.log, re.M)


def test_a_signal_ends_it_whichever_thread_gets_it():
    with scripted() as server:
        threads = {int(each) for each in os.listdir(f"/proc/{server.process.pid}/task")} - {server.process.pid}
        ctypes.CDLL(None).tgkill(server.process.pid, min(threads), signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_while_it_loads(number):
    process = subprocess.Popen([sys.executable, "-m", MODULE, json.dumps({"load_seconds": 600}), "--port", "0"],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, KEY_VARIABLE: ""})
    try:
        assert " loads " in process.stdout.readline()
        process.send_signal(number)
        assert process.communicate(timeout=PATIENCE) == ("", "") and process.returncode == 0
    finally:
        process.kill()
        process.wait()


def test_a_front_knows_where_it_is():
    front = Front(serve.Settings(names=(NAME,), host="0.0.0.0", root_path="/x", keys=("k",)))
    try:
        assert front.url == f"http://127.0.0.1:{front.listener.port}/x"
    finally:
        front.stop(0)
