"""`llama generate`: one text, its forms of output, and what may stand where."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.commands.small import ALPHABET, make_checkpoint


def test_a_text_is_continued_as_it_stands(llama, checkpoint):
    ran = llama("generate", "Hello", "--model", checkpoint)
    assert (ran.code, ran.out, ran.err) == (0, "pqrstuvwxyzé\n", "")


@pytest.mark.parametrize("text", [[], ["-"]])
def test_a_pipe_is_continued_without_the_line_end_that_closes_a_file(llama, checkpoint, text):
    assert llama("generate", *text, "--model", checkpoint, stdin="a\nu\n").out == "vwxyzé\n"
    assert llama("generate", *text, "--model", checkpoint, stdin="u\n\n").out == f"{ALPHABET}\n"


def test_a_text_leaves_the_pipe_alone(llama, checkpoint):
    assert llama("generate", "u", "--model", checkpoint, stdin="a").out == "vwxyzé\n"


def test_no_text_is_an_error(llama, checkpoint, monkeypatch):
    ran = llama("generate", "--model", checkpoint, stdin="")
    assert (ran.code, ran.err) == (1, "llama: error: there is no text to continue: stdin is empty\n")
    monkeypatch.setattr("llama.commands.generate.is_terminal", lambda stream: True)
    ran = llama("generate", "--model", checkpoint)
    assert ran.code == 2
    assert ran.err == "llama: error: there is no text to continue: give one, or pipe one in\n"


def test_a_stop_string_ends_it_and_may_be_given_twice(llama, checkpoint):
    assert llama("generate", "a", "--model", checkpoint, "--stop", "xy", "--stop", "fg").out == "bcde\n"


def test_several_continuations(llama, checkpoint):
    ran = llama("generate", "u", "--model", checkpoint, "--n", 2)
    assert (ran.out, ran.err) == ("vwxyzé\nvwxyzé\n", "[1]\n[2]\n")


def test_json_is_one_line_with_everything(llama, checkpoint):
    ran = llama("generate", "w", "--model", checkpoint, "--json", "--logprobs", 1, "--max-tokens", 2)
    assert ran.out.count("\n") == 1
    result = json.loads(ran.out)
    logprobs = result.pop("logprobs")
    assert result == {"text": "xy", "finish_reason": "length", "stop_reason": None,
                      "usage": {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}}
    assert [(entry["token"], entry["token_id"]) for entry in logprobs] == [("x", 120), ("y", 121)]
    assert -1e-3 < logprobs[0]["logprob"] <= 0
    assert logprobs[0]["top"] == [{"token": "x", "token_id": 120, "logprob": logprobs[0]["logprob"]}]


def test_json_of_several_continuations_lists_them(llama, checkpoint):
    ran = llama("generate", "y", "--model", checkpoint, "--json", "--n", 2, "--stop", "é")
    sample = {"text": "z", "finish_reason": "stop", "stop_reason": "é"}
    assert json.loads(ran.out) == {"samples": [sample, sample], "usage": {
        "prompt_tokens": 2, "completion_tokens": 6, "total_tokens": 8}}


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_stats_are_printed_beside_the_result(llama, checkpoint, flags):
    ran = llama("generate", "u", "--model", checkpoint, "--stats", *flags)
    assert re.fullmatch(r"prompt 2 tokens, first token after \d+\.\d\d s; reply 8 tokens in \d+\.\d\d s, "
                        r"\d+\.\d tokens/s\n", ran.err)
    assert "tokens/s" not in ran.out


def test_what_does_not_fit_the_context_is_refused_with_the_numbers(llama, checkpoint):
    ran = llama("generate", "u", "--model", checkpoint, "--context", 10, "--max-tokens", 9)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == ("llama: error: the prompt's 2 tokens and max_tokens 9 together exceed the context of "
                       "10 tokens; lower max_tokens to at most 8\n")


def test_a_reader_who_leaves_ends_it_quietly(endless):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen([sys.executable, "-m", "llama", "generate", "Hello", "--model", endless],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as process:
        assert process.stdout.read(5) == b"pqrst"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_checkpoint_without_a_template_is_enough(llama, tmp_path):
    make_checkpoint(tmp_path, template=False)
    assert llama("generate", "y", "--model", tmp_path).out == "zé\n"
