"""`llama eval`: what it prints, what it refuses, and that the reference is gone before the model comes."""

import json
import math
import weakref

import pytest

from llama.commands import eval as command
from llama.runtime import Llama
from tests.commands.small import ALPHABET, make_checkpoint
from tools.make_checkpoint import main as make_random

# Of this model a letter's successor has one logit of 22.6 (its residual stream's, normed) among 511 of 0.
PERPLEXITY = 1 + 511 * math.exp(-math.sqrt(512) / math.sqrt(1 + 512e-5))


@pytest.fixture
def files(tmp_path):
    """Writes a text and questions: files(text, *lines) -> their paths."""

    def write(text, *lines):
        (tmp_path / "text.txt").write_text(text)
        (tmp_path / "q.jsonl").write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n"
                                                  for line in lines))
        return tmp_path / "text.txt", tmp_path / "q.jsonl"

    return write


RIGHT = {"context": "abc", "choices": ["d", "defg"], "answer": 1, "id": "x"}


def test_a_text_and_questions_as_json(llama, checkpoint, files):
    text, questions = files("\n" + ALPHABET[:-1], {"question": "x", "choices": ["bcd", "bdd"], "answer": "bcd"}, "",
                            RIGHT)
    ran = llama("eval", "--model", checkpoint, "--text", text, "--choices", questions, "--length", 9, "--json")
    assert (ran.code, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert found["model"] == str(checkpoint)
    measured = found["text"]
    assert {name: measured[name] for name in ("file", "length", "stride", "windows", "tokens", "scored_tokens")} == {
        "file": str(text), "length": 9, "stride": 9, "windows": 3, "tokens": 28, "scored_tokens": 24}
    # beginning of text foresees nothing: all 512 are as likely
    assert measured["nll"] == pytest.approx(math.log(512) + 23 * math.log(PERPLEXITY), rel=1e-4)
    assert measured["perplexity"] == pytest.approx(math.exp(measured["nll"] / 24))
    choices = found["choices"]
    assert (choices["num_questions"], choices["num_right"], choices["num_right_by_length"]) == (2, 1, 2)
    assert (choices["accuracy"], choices["accuracy_stderr"]) == (0.5, 0.5)
    assert [one["line"] for one in choices["log_likelihoods"]] == [1, 3]


def test_the_same_to_read(llama, checkpoint, files):
    text, questions = files(ALPHABET, RIGHT)
    ran = llama("eval", "--model", checkpoint, "--text", text, "--choices", questions, "--against", "bfloat16",
                "--length", 20, "--stride", 10)
    assert (ran.code, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0] == f"{text}: 19 of 29 tokens scored, in 1 windows of 20 at a stride of 10"
    assert lines[1].startswith("perplexity        1.3")
    assert lines[2] == "against bfloat16"
    assert lines[3].startswith("  perplexity      1.3")
    assert lines[4].startswith("  KL, in nats     ") and "99.9% below" in lines[4]
    assert lines[5] == "  same top token  100.00%"
    assert lines[6:] == [f"{questions}: 1 questions", "accuracy          0.00% ± 0.00%",
                         "  by characters   100.00% ± 0.00%"]


def test_the_reference_is_never_beside_the_model(llama, tmp_path, files, capsys, monkeypatch):
    """Neither another dtype nor another checkpoint."""
    make_random([str(tmp_path / "one"), "--shape", "tiny", "--vocab-size", "1280", "--tokenizer", "llama/demo"])
    make_random([str(tmp_path / "two"), "--shape", "tiny", "--vocab-size", "1280", "--tokenizer", "llama/demo",
                 "--seed", "1"])
    text, _ = files("Some text that is long enough to be read.")
    capsys.readouterr()  # what was made
    loaded, original = [], Llama.load.__func__

    def load(cls, directory, **options):
        assert all(blocks() is None for *_, blocks in loaded)
        model = original(cls, directory, **options)
        loaded.append((directory.name, options["dtype"], weakref.ref(model.model.blocks)))
        return model

    monkeypatch.setattr(Llama, "load", classmethod(load))
    results = []
    for against in ("float32", tmp_path / "two"):
        ran = llama("eval", "--model", tmp_path / "one", "--text", text, "--against", against, "--json")
        results.append(json.loads(ran.out)["text"]["against"])
    assert [one[:2] for one in loaded] == [("one", "float32"), ("one", None), ("two", None), ("one", None)]
    assert 0 < results[0]["kl_mean"] < 0.01 < results[1]["kl_mean"]
    assert list(results[0]["kl_percentiles"]) == ["50", "90", "99", "99.9", "100"]


def test_the_reference_has_keys_and_values_as_they_are(llama, files):
    text, _ = files("Some text that is long enough to be read in more than one step. " * 20)
    ran = llama("eval", "--text", text, "--against", "bfloat16", "--kv-cache-dtype", "fp8", "--json")
    assert 0 < json.loads(ran.out)["text"]["against"]["kl_mean"] < 0.1


def test_a_reference_that_makes_other_tokens_is_refused(llama, checkpoint, files):
    text, _ = files("Some text.")
    ran = llama("eval", "--text", text, "--against", checkpoint)
    assert ran.code == 1
    assert ran.err == (f"llama: error: --against {checkpoint}: its tokenizer makes other tokens of {text}, so that "
                       "there is nothing to compare; give a checkpoint of the same family\n")


@pytest.mark.parametrize("flags, message", [
    ([], "nothing to measure; give --text, --choices or both"),
    (["--choices", "q", "--stride", "5"], "--stride: only a text is measured so; add --text"),
    (["--choices", "q", "--length", "5"], "--length: only a text is measured so; add --text"),
    (["--choices", "q", "--against", "float32"], "--against: only a text is measured so; add --text"),
    (["--text", "t", "--length", "5000"],
     "--length: windows of 5000 tokens are not what this model can read; give 2 to 4096"),
    (["--text", "t", "--length", "1"],
     "--length: windows of 1 tokens are not what this model can read; give 2 to 4096"),
    (["--text", "t", "--context", "100", "--length", "101"],
     "--length: windows of 101 tokens are not what this model can read; give 2 to 100"),
    (["--text", "t", "--stride", "3000"],
     "--stride: windows of 2048 tokens that begin every 3000 leave tokens out; give 1 to 2048"),
])
def test_flags_that_do_not_go_together(llama, checkpoint, flags, message):
    ran = llama("eval", "--model", checkpoint, *flags)
    assert (ran.code, ran.out, ran.err) == (2, "", f"llama: error: {message}\n")


def test_windows_are_no_longer_than_the_context(llama, tmp_path, files):
    text, _ = files("abcdefgh" * 10)
    make_checkpoint(tmp_path / "short", context=50)
    ran = llama("eval", "--model", tmp_path / "short", "--text", text, "--json")
    assert json.loads(ran.out)["text"]["length"] == 50


@pytest.mark.parametrize("content, message", [
    (b"one\ntw\xff\n", ", line 2: byte 0xff is no UTF-8; convert the text"),
    (b"", ": the text has 1 tokens, and nothing to foresee; give a longer one")])
def test_what_is_no_text(llama, checkpoint, tmp_path, content, message):
    (tmp_path / "text.txt").write_bytes(content)
    ran = llama("eval", "--model", checkpoint, "--text", tmp_path / "text.txt")
    assert (ran.code, ran.out, ran.err) == (1, "", f"llama: error: {tmp_path / 'text.txt'}{message}\n")


@pytest.mark.parametrize("line, message", [
    ("[1]", "this is no JSON object; a question looks like {\"question\": \"What is frozen water?\""),
    ({"choices": ["a", "b"], "answer": 0}, "give either \"question\" or \"context\""),
    ({"question": "a", "context": "a", "choices": ["a", "b"], "answer": 0},
     "give either \"question\" or \"context\", not both"),
    ({"question": 7, "choices": ["a", "b"], "answer": 0}, "question must be a text, not 7"),
    ({"context": None, "choices": ["a", "b"], "answer": 0}, "context must be a text, not None"),
    ({"question": "a", "choices": ["a"], "answer": 0},
     "choices must be a list of two or more texts, none empty, not ['a']"),
    ({"question": "a", "choices": ["a", ""], "answer": 0}, "none empty, not ['a', '']"),
    ({"question": "a", "choices": ["a", "b"], "answer": 2},
     "answer must be one of the choices, or its place from 0 to 1, not 2"),
    ({"question": "a", "choices": ["a", "b"], "answer": True}, "its place from 0 to 1, not True"),
    ({"question": "a", "choices": ["a", "a"], "answer": "a"}, "answer must be one of the choices"),
    ({"question": "a", "choices": ["a", "b"]}, "its place from 0 to 1, not None"),
    ({"question": "a", "choices": ["a", "b"], "answer": 0, "label": 0},
     "'label' is no field of a question; there are question, context, choices, answer, id"),
])
def test_a_bad_line_is_refused_by_its_number_before_the_model_is_loaded(llama, checkpoint, files, monkeypatch, line,
                                                                        message):
    def refuse(args):
        raise AssertionError("loaded")

    monkeypatch.setattr(command, "load", refuse)
    _, questions = files("", RIGHT, "", line)
    ran = llama("eval", "--model", checkpoint, "--choices", questions)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"llama: error: {questions}, line 3: ") and message in ran.err
    assert ran.err.count("\n") == 1


def test_a_question_that_the_context_does_not_hold_is_refused_by_its_line(llama, checkpoint, files):
    _, questions = files("", RIGHT, {**RIGHT, "context": "a" * 4096})
    ran = llama("eval", "--model", checkpoint, "--choices", questions)
    assert ran.code == 1
    assert f"{questions}, line 2: context and choice 'd' have 4099 tokens, and the model was made for 4096" in ran.err


def test_a_file_without_questions_is_refused(llama, checkpoint, files):
    _, questions = files("", "")
    ran = llama("eval", "--model", checkpoint, "--choices", questions)
    assert ran.err == f"llama: error: {questions} holds no questions; give one JSON object a line\n"
