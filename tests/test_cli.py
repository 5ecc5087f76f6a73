"""The `llama` command: its flags, its exit codes, and how errors look."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llama
from llama.cli import build_parser, main
from llama.commands.loading import load, sampling_params
from llama.config import ConfigError
from llama.engine.request import SamplingParams
from tests.commands.small import make_checkpoint


@pytest.fixture(autouse=True)
def closed_stdin(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)


def main_code(*args):
    """The exit code of the command in this process."""
    try:
        return main(args)
    except SystemExit as error:
        return error.code


def parsers(parser):
    """A parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from parsers(inner)


def test_every_flag_has_help():
    found = list(parsers(build_parser()))
    assert [parser.prog for parser in found] == ["llama", "llama chat", "llama generate", "llama serve", "llama trace",
                                                 "llama info", "llama eval", "llama quantize", "llama pull"]
    for parser in found:
        assert parser.description
        for action in parser._actions:
            if not isinstance(action, argparse._SubParsersAction):
                assert action.help and action.help != argparse.SUPPRESS, (parser.prog, action.dest)


def test_every_command_has_debug_and_says_what_it_is_for(capsys):
    assert main_code("--help") == 0
    shown = capsys.readouterr().out
    for name in ("chat", "generate", "info", "eval", "quantize", "pull"):
        assert f"\n    {name} " in shown
        assert main_code(name, "--help") == 0
        assert "--debug" in capsys.readouterr().out


def test_what_needs_no_model_brings_in_no_torch(tmp_path):
    make_checkpoint(tmp_path)
    calls = [["--help"], ["--version"], ["chat", "--top-p", "7", "hi"], ["chat"], ["generate", "--n", "0"],
             ["generate"], ["generate", "x", "--logprobs", "1"],
             ["info", "--no-load", "--model", str(tmp_path)],
             ["chat", "x", "--context", "9999", "--model", str(tmp_path)], ["pull", "no such"], ["eval"],
             ["quantize", str(tmp_path), str(tmp_path), "--format", "int8"],
             ["eval", "--choices", str(tmp_path / "config.json"), "--model", str(tmp_path)]]
    script = ("import sys\nfrom llama.cli import main\n"
              f"for args in {calls!r}:\n"
              "    try: main(args)\n"
              "    except SystemExit: pass\n"
              "    assert 'torch' not in sys.modules, args\n")
    ran = subprocess.run([sys.executable, "-c", script], stdin=subprocess.DEVNULL, capture_output=True,
                         text=True)
    assert ran.returncode == 0, ran.stderr


def test_python_m_llama_is_the_same():
    ran = subprocess.run([sys.executable, "-m", "llama", "--version"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "llama 0.1.0\n")


def test_a_broken_pipe_is_no_complaint():
    reading, writing = os.pipe()
    os.close(reading)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ran = subprocess.run([sys.executable, "-m", "llama", "--help"], stdout=writing, stderr=subprocess.PIPE,
                         env=buffered)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, b"")


@pytest.mark.parametrize("args, message", [
    ([], "the following arguments are required: COMMAND; see llama --help"),
    (["sing"],
     "argument COMMAND: invalid choice: 'sing' (choose from 'chat', 'generate', 'serve', 'trace', 'info', 'eval', "
     "'quantize', 'pull'); see llama --help"),
    (["quantize", "a", "b"], "the following arguments are required: --format; see llama quantize --help"),
    (["chat", "--top", "1"], "ambiguous option: --top could match --top-p, --top-k; see llama chat --help"),
    (["chat", "--temperature", "warm"],
     "argument --temperature: invalid float value: 'warm'; see llama chat --help"),
    (["chat", "--temperature", "1", "--greedy"],
     "argument --greedy: not allowed with argument --temperature; see llama chat --help"),
    (["info", "--context", "0"], "argument --context: '0' is not a number from 1 up; see llama info --help"),
    (["chat", "--kv-cache", "many"],
     "argument --kv-cache: 'many' is not a size such as 4GiB or 500MB; see llama chat --help"),
    (["chat", "x", "--temperature", "5"], "--temperature: temperature must be a number from 0 to 2, not 5.0"),
    (["chat", "x", "--stop", ""], "--stop: stop must be at most 16 strings, none of them empty"),
    (["generate", "x", "--n", "17"], "--n: n must be an integer from 1 to 16, not 17"),
    (["generate", "x", "--logprobs", "1"],
     "--logprobs: log probabilities are printed as JSON only; add --json"),
    (["generate", "x", "--device", "abacus"],
     "--device 'abacus' is no device that this code runs on; give cpu, cuda or cuda:N"),
])
def test_usage_errors_are_one_line_and_2(capsys, tmp_path, args, message):
    if "--device" in args:
        args = [*args, "--model", str(make_checkpoint(tmp_path))]
    assert main_code(*args) == 2
    assert capsys.readouterr() == ("", f"llama: error: {message}\n")


@pytest.mark.parametrize("args, message", [
    (["chat", "x", "--model", "no such"],
     "'no such' is no directory here, and no hub id such as meta-llama/Llama-3.1-8B-Instruct"),
    (["chat", "x", "--model", "{empty}"],
     "{empty} holds neither config.json nor params.json; name the directory of a Llama checkpoint"),
    (["chat", "x", "--context", "5000", "--model", "{model}"],
     "a context of 5000 tokens is not what this model was made for; give 1 to 4096"),
    (["generate", "x", "--device", "cuda:99", "--model", "{model}"],
     "--device cuda:99: torch "),
    (["generate", "--input", "{empty}/in", "--output", "{empty}/out"],
     "{empty}/in: No such file or directory"),
    (["generate", "x", "--kv-cache", "10", "--model", "{model}"],
     "10 bytes for the KV cache hold not one block of 16 positions, which takes 1024; give kv_cache_bytes "
     "more"),
])
def test_errors_are_one_line_and_1(capsys, tmp_path, args, message):
    places = {"empty": tmp_path / "empty", "model": tmp_path / "model"}
    places["empty"].mkdir()
    places["model"].mkdir()
    make_checkpoint(places["model"])
    assert main_code(*(text.format(**places) for text in args)) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"llama: error: {message.format(**places)}")
    assert err.count("\n") == 1


def failing(error):
    """A command that raises it."""
    def run(args):
        raise error

    return run


def test_debug_shows_the_traceback_and_the_error_all_the_same(capsys, monkeypatch):
    monkeypatch.setattr("llama.commands.pull.run", failing(ConfigError("this and\nthat")))
    assert main_code("pull", "x") == 1
    assert capsys.readouterr().err == "llama: error: this and that\n"
    assert main_code("pull", "x", "--debug") == 1
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last):\n")
    assert err.endswith("\nllama: error: this and that\n")


def test_an_error_of_somebody_else_says_what_it_is(capsys, monkeypatch):
    monkeypatch.setattr("llama.commands.pull.run", failing(KeyError("x")))
    assert main_code("pull", "x") == 1
    assert capsys.readouterr().err == ("llama: error: KeyError: 'x'; this should not happen, and --debug "
                                       "shows where it does\n")
    monkeypatch.setattr("llama.commands.pull.run", failing(FileNotFoundError(2, "No such file", "there")))
    main_code("pull", "x")
    assert capsys.readouterr().err == "llama: error: there: No such file\n"


def test_ctrl_c_is_130_without_a_word(capsys, monkeypatch):
    monkeypatch.setattr("llama.commands.pull.run", failing(KeyboardInterrupt()))
    assert main_code("pull", "x") == 130
    assert capsys.readouterr() == ("", "")


def test_pull_prints_the_directory(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("llama.commands.pull.resolve", {"some/model": tmp_path}.get)
    assert main_code("pull", "some/model") == 0
    assert capsys.readouterr() == (f"{tmp_path}\n", "")


def test_sampling_flags_are_the_fields_of_sampling_params():
    args = build_parser().parse_args(
        "generate x --max-tokens 7 --temperature 0.5 --top-p 0.6 --top-k 3 --min-p 0.1 --seed 9 --stop a "
        "--stop b --frequency-penalty 0.2 --presence-penalty -0.3 --repetition-penalty 1.4".split())
    assert sampling_params(args, n=2) == SamplingParams(
        max_tokens=7, temperature=0.5, top_p=0.6, top_k=3, min_p=0.1, seed=9, stop=("a", "b"),
        frequency_penalty=0.2, presence_penalty=-0.3, repetition_penalty=1.4, n=2)
    assert sampling_params(build_parser().parse_args(["chat"])) == SamplingParams()
    assert sampling_params(build_parser().parse_args(["chat", "--greedy"])) == SamplingParams(temperature=0.0)


def test_model_flags_reach_the_loader(monkeypatch, tmp_path):
    make_checkpoint(tmp_path)
    threads, loaded = [], []
    monkeypatch.setattr("torch.set_num_threads", threads.append)
    monkeypatch.setattr("llama.runtime.Llama.load",
                        lambda directory, **options: loaded.append((directory, options)))
    load(build_parser().parse_args([
        "chat", "--model", str(tmp_path), "--dtype", "bfloat16", "--threads", "3", "--context", "50",
        "--kv-cache", "1.5GiB", "--draft", "small", "--deterministic", "--quantize", "int4"]))
    load(build_parser().parse_args(["chat", "--model", str(tmp_path), "--prompt-lookup"]))
    rest = {"dtype": None, "device": "cpu", "quantize": None, "max_context": 4096, "kv_cache_bytes": None,
            "kv_cache_dtype": None, "prompt_lookup": False, "draft": None, "deterministic": False}
    assert loaded == [
        (tmp_path, rest | {"dtype": "bfloat16", "max_context": 50, "kv_cache_bytes": 3 << 29,
                           "draft": "small", "deterministic": True, "quantize": "int4"}),
        (tmp_path, rest | {"prompt_lookup": True})]
    assert threads == [3]


@pytest.mark.parametrize("text, num_bytes", [
    ("1000", 1000), ("4GiB", 4 << 30), ("4gib", 4 << 30), ("4G", 4 * 10**9), ("500MB", 5 * 10**8),
    ("1.5 KiB", 1536), ("2T", 2 * 10**12), ("7B", 7)])
def test_sizes(text, num_bytes):
    assert build_parser().parse_args(["chat", "--kv-cache", text]).kv_cache == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "4IB", "-1", "4GG", "1e9", "4Gi B"])
def test_what_is_no_size(text):
    assert main_code("chat", f"--kv-cache={text}") == 2


def test_the_demo_model_is_there_without_a_flag(capsys):
    assert main_code("chat", "Hello") == 0
    assert capsys.readouterr() == ("Hello. How can I assist you today?\n", "")
    assert main_code("info", "--no-load") == 0
    assert capsys.readouterr().out.startswith(f"the demo model ({Path(llama.__file__).parent / 'demo'})\n")
