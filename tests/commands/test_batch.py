"""`llama generate --input --output`: results, resuming, and refusals."""

import json
import signal
import subprocess
import sys
import time

import pytest

from llama.commands import batch
from llama.runtime import Llama
from llama.text import grammar


@pytest.fixture
def answer(llama, checkpoint, tmp_path):
    """Runs a batch over lines (objects, or text as it stands): answer(lines, *flags) -> (Ran, results)."""

    def run(lines, *flags, model=checkpoint):
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        source.write_text("".join(f"{text}\n" for text in texts))
        ran = llama("generate", "--input", source, "--output", target, "--model", model, *flags)
        results = [json.loads(line) for line in target.read_text().splitlines()] if target.exists() else []
        return ran, results

    return run


def by_line(results):
    """Texts by the prompt's line."""
    assert len({result["line"] for result in results}) == len(results)
    return {result["line"]: result["text"] for result in results}


def test_prompts_texts_ids_and_messages_are_answered(answer):
    ran, results = answer([{"prompt": "u", "id": "first"}, "", {"prompt": [256, ord("w")]},
                           {"messages": [{"role": "user", "content": "hi"}], "id": 7, "max_tokens": 3}])
    assert ran.code == 0
    assert ran.out == ""
    assert by_line(results) == {1: "vwxyzé", 3: "xyzé", 4: "abc"}
    first = next(result for result in results if result["line"] == 1)
    assert list(first) == ["line", "id", "digest", "text", "finish_reason", "stop_reason", "usage"]
    assert first["usage"] == {"prompt_tokens": 2, "completion_tokens": 8, "total_tokens": 10}
    assert {result["line"]: result.get("id") for result in results} == {1: "first", 3: None, 4: 7}


def test_a_line_overrides_the_flags(answer):
    _, results = answer([{"prompt": "a"}, {"prompt": "a", "max_tokens": 5, "stop": "e"},
                         {"prompt": "a", "logit_bias": {"122": 100.0}, "temperature": 0},
                         {"prompt": "a", "n": 2, "logprobs": 0, "prompt_logprobs": 0}], "--max-tokens", 2)
    results = {result["line"]: result for result in results}
    assert [results[line]["text"] for line in (1, 2, 3)] == ["bc", "bcd", "zz"]
    assert [sample["text"] for sample in results[4]["samples"]] == ["bc", "bc"]
    assert [entry["token"] for entry in results[4]["prompt_logprobs"]] == ["<|begin_of_text|>", "a"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_drawn_on_a_terminal(answer, monkeypatch, is_terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    ran, _ = answer([{"prompt": "a"}, {"prompt": "b"}], "--max-tokens", 2)
    assert ("\ranswering [#########################] 2/2 prompts, " in ran.err) == is_terminal


def test_all_run_together_and_each_is_written_when_it_is_finished(answer, monkeypatch):
    running, original = [], Llama.complete

    def spy(self, requests):
        for result in original(self, requests):
            running.append(len(self.engine.scheduler.running))
            yield result

    monkeypatch.setattr(Llama, "complete", spy)
    lengths = [20, 5, 10, 1]
    _, results = answer([{"prompt": "a", "max_tokens": length} for length in lengths])
    assert [result["line"] for result in results] == [4, 2, 3, 1]
    assert running == [3, 2, 1, 0]


def test_what_is_answered_is_skipped_and_the_model_is_not_loaded_for_nothing(answer, monkeypatch):
    lines = [{"prompt": "u"}, {"prompt": "w"}]
    answer(lines[:1])
    ran, results = answer(lines)
    assert by_line(results) == {1: "vwxyzé", 2: "xyzé"}
    assert "2 prompts are answered in" in ran.err

    def refuse(args):
        raise AssertionError("loaded")

    monkeypatch.setattr(batch, "load", refuse)
    ran, again = answer(lines)
    assert (ran.code, again) == (0, results)


def test_an_id_finds_its_answer_wherever_its_line_has_gone(answer):
    answer([{"prompt": "u", "id": "a"}])
    _, results = answer([{"prompt": "w", "id": "b"}, {"prompt": "u", "id": "a"}])
    assert [result["id"] for result in results] == ["a", "b"]


@pytest.mark.parametrize("line, flags", [
    ({"prompt": "v", "id": 1}, ()), ({"prompt": "u", "id": 1, "max_tokens": 3}, ()),
    ({"prompt": "u", "id": 1}, ("--max-tokens", 3)), ({"prompt": "u", "id": 1}, ("--dtype", "bfloat16"))])
def test_a_prompt_that_has_changed_is_answered_anew_and_that_is_said(answer, line, flags):
    answer([{"prompt": "u", "id": 1}])
    ran, results = answer([line], *flags)
    assert len(results) == 2
    assert "answers 1 of these prompts as they were before, or with other flags or another model" in ran.err


def test_another_model_answers_anew_and_the_same_by_another_path_does_not(answer, checkpoint, endless):
    lines = [{"prompt": "u", "max_tokens": 3}]
    answer(lines)
    _, results = answer(lines, model=checkpoint / ".." / checkpoint.name)
    assert len(results) == 1
    _, results = answer(lines, model=endless)
    assert len(results) == 2


def test_a_torn_last_line_is_repaired(answer, tmp_path):
    lines = [{"prompt": "u"}, {"prompt": "w"}]
    _, results = answer(lines)
    target = tmp_path / "out.jsonl"
    whole = target.read_bytes()
    first_length = whole.index(b"\n") + 1
    for cut in (len(whole) - 1, len(whole) - 40, first_length + 12, first_length + 3):
        target.write_bytes(whole[:cut])
        ran, repaired = answer(lines)
        assert ran.code == 0
        assert repaired == results


def test_it_goes_on_where_it_was_killed(endless, answer, tmp_path):
    lines = [{"prompt": "a", "max_tokens": num_tokens} for num_tokens in (20, 40, 60, *range(400, 404))]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "llama", "generate", "--input", source, "--output", target,
               "--model", endless]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not target.exists() or target.read_bytes().count(b"\n") < 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    before = target.read_bytes()
    before = before[:before.rfind(b"\n") + 1]
    assert 3 <= before.count(b"\n") < len(lines)
    _, results = answer(lines, model=endless)
    assert target.read_bytes().startswith(before)
    assert len(results) == len(lines)
    assert {result["line"]: result["usage"]["completion_tokens"] for result in results} == \
        {number: line["max_tokens"] for number, line in enumerate(lines, start=1)}


def test_ctrl_c_says_how_far_it_came(answer, monkeypatch):
    original = Llama.complete

    def interrupted(self, requests):
        yield next(original(self, requests))
        raise KeyboardInterrupt

    monkeypatch.setattr(Llama, "complete", interrupted)
    ran, results = answer([{"prompt": "u"}, {"prompt": "a"}])
    assert ran.code == 130
    assert "1 of 2 prompts are answered in" in ran.err and "the same command goes on from there" in ran.err
    assert len(results) == 1


@pytest.mark.parametrize("line, message", [
    ("[1]", "this is no JSON object; a prompt looks like {\"prompt\": \"Once upon a time\"}"),
    ("{\"prompt\": \"a\"", "this is no JSON object; a prompt looks like {\"prompt\": \"Once upon a time\"}"),
    ({}, "give either \"prompt\" or \"messages\""),
    ({"prompt": "a", "messages": []}, "give either \"prompt\" or \"messages\", not both"),
    ({"prompt": 3}, "prompt must be a text or a list of token ids, not 3"),
    ({"prompt": [True]}, "prompt must be a text or a list of token ids, not [True]"),
    ({"prompt": []}, "prompt must be a text or a list of token ids, not []"),
    ({"messages": "hi"}, "messages must be a list of messages, not 'hi'"),
    ({"prompt": "a", "id": True}, "id must be a string or an integer, not True"),
    ({"prompt": "a", "id": "x"}, "its id 'x' is that of line 1 too; ids must differ"),
    ({"prompt": "a", "top": 1},
     "'top' is no field of a prompt; there are prompt, messages, id, max_tokens, temperature"),
    ({"prompt": "a", "top_p": 7}, "top_p must be a number above 0 and at most 1, not 7"),
    ({"prompt": "a", "stop": 5}, "stop must be a string or a list, not 5"),
    ({"prompt": "a", "logit_bias": [1]}, "logit_bias must be an object, not [1]"),
    ({"prompt": "a", "ignore_eos": "no"}, "ignore_eos must be true or false, not 'no'"),
    ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias must map token ids, not 'x'"),
    # These need the model, and come before anything is generated all the same.
    ({"prompt": [600]}, "prompt has the id 600, which is outside the vocabulary of 512 tokens"),
    ({"messages": [{"role": "nobody"}]}, "messages"),
    ({"prompt": "a", "max_tokens": 5000}, "together exceed the context of 4096 tokens"),
])
def test_a_bad_line_is_refused_by_its_number_before_anything_is_generated(answer, line, message, tmp_path):
    ran, results = answer([{"prompt": "u", "id": "x"}, "", line])
    assert ran.code == 1
    assert f"llama: error: {tmp_path / 'in.jsonl'}, line 3: " in ran.err and message in ran.err
    assert ran.err.count("\n") == 1
    assert results == []


def test_an_input_without_prompts_is_refused(answer):
    ran, _ = answer(["", ""])
    assert ran.err.endswith("in.jsonl holds no prompts; give one JSON object a line\n")


def test_a_file_of_something_else_is_never_written_to(answer, tmp_path, llama):
    target = tmp_path / "out.jsonl"
    for content in ("my notes", "my notes\n", '{"a": 1}\n', '{"line": 1, "text": "no digest"}\n'):
        target.write_text(content)
        source = tmp_path / "in.jsonl"
        source.write_text('{"prompt": "u"}\n')
        ran = llama("generate", "--input", source, "--output", target)
        assert ran.err == (f"llama: error: {target}, line 1: this is no result of `llama generate`; choose "
                           "another --output\n")
        assert target.read_text() == content
    ran = llama("generate", "--input", source, "--output", source)
    assert ran.err == f"llama: error: {source} is the input; choose another --output\n"


@pytest.mark.parametrize("flags, message", [
    (["--input", "x"], "--input and --output go together: prompts from the one, results to the other"),
    (["--output", "x"], "--input and --output go together: prompts from the one, results to the other"),
    (["--input", "x", "--output", "y", "text"],
     "a text does not go with --input: each line of the file is a prompt, and each result is JSON in any "
     "case"),
    (["--input", "x", "--output", "y", "--json"],
     "--json does not go with --input: each line of the file is a prompt, and each result is JSON in any "
     "case")])
def test_flags_that_do_not_go_together(llama, flags, message):
    ran = llama("generate", *flags)
    assert (ran.code, ran.err) == (2, f"llama: error: {message}\n")


def test_a_grammar_is_followed_and_one_that_is_none_is_refused_with_its_line(answer):
    lines = [{"prompt": "u", "max_tokens": 9, "grammar": grammar.regex("[xyz]{4}")}]
    _, [result] = answer(lines)
    assert len(result["text"]) == 4 and set(result["text"]) <= set("xyz")
    ran, _ = answer([*lines, {"prompt": "u", "grammar": "none"}])
    assert ran.code == 1 and "in.jsonl, line 2: grammar cannot be followed" in ran.err
