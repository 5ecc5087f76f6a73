"""`llama quantize`: a checkpoint that is used as any other, and what it refuses before it reads the weights."""

import json
import shutil

import pytest
import torch

from llama.checkpoint import load, save
from llama.checkpoint.load import load_model
from llama.commands import quantize
from tests.commands.small import make_checkpoint


@pytest.fixture(scope="module", params=["int8", "int4"])
def quantised(request, checkpoint, tmp_path_factory):
    """The format, and the checkpoint in it, as the command wrote it."""
    from llama.cli import main

    out = tmp_path_factory.mktemp("quantised") / "deep" / "er"
    assert main(["quantize", str(checkpoint), str(out), "--format", request.param]) == 0
    return request.param, out


def test_it_holds_what_loading_with_quantize_makes(checkpoint, quantised):
    name, out = quantised
    expected, found = load_model(checkpoint, weights=name), load_model(out)
    assert found.config.quantization == name and found.dtype == torch.float32
    for key, tensor in expected.state_dict().items():
        assert found.state_dict()[key].equal(tensor), key


def test_what_lies_beside_the_weights_comes_along_and_nothing_else(checkpoint, quantised):
    _, out = quantised
    assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors", "tokenizer.model",
                                                     "chat_template.jinja"}
    for name in ("tokenizer.model", "chat_template.jinja"):
        assert (out / name).read_bytes() == (checkpoint / name).read_bytes()


def test_it_is_talked_to_and_looked_at_as_any_other(llama, quantised):
    name, out = quantised
    assert llama("chat", "Hello", "--model", out).out == "abcdefghijklmnopqrstuvwxyzé\n"
    ran = llama("info", "--model", out)
    assert ran.code == 0 and f"\n  in {name} " in ran.out
    assert f"with weights in {name} and" in ran.out and "the checkpoint's own" in ran.out.split(f"  in {name} ")[1]
    found = json.loads(llama("info", "--model", out, "--json").out)
    assert found["loaded"]["weight_bytes"] == found["stored"]["bytes"]
    assert found["stored"]["dtypes"] == ["F32", "U8"]


def test_it_says_what_it_wrote(llama, checkpoint, tmp_path):
    ran = llama("quantize", checkpoint, tmp_path / "out", "--format", "int8", "--dtype", "bfloat16")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"{tmp_path / 'out'}: 575 KiB in int8, where float32 takes 2.1 MiB\n"
    assert load_model(tmp_path / "out").dtype == torch.bfloat16


def test_the_writing_is_drawn_on_a_terminal(llama, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    ran = llama("quantize", checkpoint, tmp_path / "out", "--format", "int4")
    assert "\rloading [" in ran.err and "\rwriting [#########################] 0.6 of 0.6 MB" in ran.err


@pytest.mark.parametrize("name", ["config.json", "notes.txt"])
def test_a_directory_that_is_not_empty_is_left_alone(llama, checkpoint, tmp_path, name):
    (tmp_path / name).write_text("precious")
    ran = llama("quantize", checkpoint, tmp_path, "--format", "int8")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err == (f"llama: error: {tmp_path} is not empty; name a directory that does not exist yet, or an empty "
                       "one\n")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]
    ran = llama("quantize", checkpoint, tmp_path / name, "--format", "int8")
    assert ran.err.startswith(f"llama: error: {tmp_path / name} is a file; name a directory")


def test_a_disk_that_is_too_small_is_refused_before_the_weights_are_read(llama, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 999, 1))
    monkeypatch.setattr(load, "load_model", None)
    ran = llama("quantize", checkpoint, tmp_path / "out", "--format", "int8")
    assert ran.code == 1
    assert ran.err.startswith(f"llama: error: {tmp_path / 'out'} has 1 bytes free, but the weights take 5")
    assert ran.err.endswith("; name a directory on another disk\n")


def test_a_disk_that_fills_meanwhile_leaves_nothing_half(llama, checkpoint, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "_as_json", fail)
    ran = llama("quantize", checkpoint, tmp_path / "out", "--format", "int8")
    assert (ran.code, ran.err) == (1, f"llama: error: {tmp_path / 'out'} cannot be written: No space left on device\n")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("wanted", ["int8", "int4"])
def test_what_is_quantised_already_is_refused(llama, quantised, tmp_path, wanted, monkeypatch):
    name, directory = quantised
    monkeypatch.setattr(load, "load_model", None)
    ran = llama("quantize", directory, tmp_path / "out", "--format", wanted)
    assert ran.err == (f"llama: error: {directory} is quantised to {name} already; name the checkpoint as it was "
                       "trained\n")
    assert not (tmp_path / "out").exists()


def test_float16_asks_for_another_dtype(llama, tmp_path):
    make_checkpoint(tmp_path / "half")
    path = tmp_path / "half" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch_dtype": "float16"}))
    ran = llama("quantize", tmp_path / "half", tmp_path / "out", "--format", "int8")
    assert ran.err == "llama: error: int8 weights compute in bfloat16 or float32; give one of them as the dtype\n"
    assert llama("quantize", tmp_path / "half", tmp_path / "out", "--format", "int8", "--dtype", "bfloat16").code == 0


def test_every_file_that_the_runtime_reads_is_copied(llama, tmp_path):
    make_checkpoint(tmp_path / "source")
    for name in quantize._BESIDE:
        (tmp_path / "source" / name).write_text("{}")
    assert llama("quantize", tmp_path / "source", tmp_path / "out", "--format", "int8").code == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", *quantize._BESIDE}
    assert {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
            "generation_config.json"} <= set(quantize._BESIDE)
