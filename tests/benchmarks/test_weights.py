"""Random weights without files: the same for every format and for peers, never zeros, and as a checkpoint too."""

import os
import subprocess
import sys

import pytest
import torch

from benchmarks.contestants import CompiledTransformers, Ours, Transformers
from benchmarks.weights import Source, draw, main
from llama.checkpoint.load import load_model
from llama.model.ragged import RaggedBatch

IDS = [5, 301, 17, 256, 8, 40]


def test_a_shape_names_its_numbers_and_layers():
    assert Source(shape="8b").config.num_layers == 32
    assert (Source(shape="1b:3").config.num_layers, Source(shape="1b:3").config.hidden_size) == (3, 2048)
    assert str(Source(shape="8b")) == "random 8b"


def test_pieces_make_a_whole_that_is_the_same_every_time(monkeypatch):
    monkeypatch.setattr("benchmarks.weights._PIECE", 64 * 32)
    pieces = list(draw("model.layers.0.mlp.up_proj.weight", (80, 64), torch.float32, "cpu"))
    assert [first for first, _ in pieces] == [0, 32, 64]
    whole = torch.cat([rows for _, rows in pieces])
    assert whole.shape == (80, 64) and whole.std() == pytest.approx(64**-0.5, rel=0.05) and (whole != 0).all()
    again = torch.cat([rows for _, rows in draw("model.layers.0.mlp.up_proj.weight", (80, 64), torch.float32, "cpu")])
    assert torch.equal(whole, again)
    other = torch.cat([rows for _, rows in draw("model.layers.1.mlp.up_proj.weight", (80, 64), torch.float32, "cpu")])
    assert not torch.equal(whole, other)


@pytest.mark.parametrize("fmt", ["bf16", "int8", "int4"])
def test_formats_are_rounded_from_the_same_weights(fmt):
    source = Source(shape="tiny")
    batch = RaggedBatch.whole(torch.tensor(IDS))
    with torch.inference_mode():
        exact = source.model("float32")(batch)
        found = source.model("bfloat16", quantize=fmt)(batch)
    assert (found - exact).std() < {"bf16": 0.03, "int8": 0.04, "int4": 0.3}[fmt] * exact.std()


@pytest.mark.parametrize("shape", ["tiny", "tiny:1"])
def test_transformers_gets_the_same_weights(shape, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, mode: model)  # tens of seconds on a CPU, and another's business
    monkeypatch.setattr("benchmarks.weights._PIECE", 64 * 32)  # so that a matrix is several
    source = Source(shape=shape)
    ours = Ours(source, {}, 32)
    for make in (Transformers, CompiledTransformers):
        theirs = make(source, 32)
        assert abs(ours.logits(IDS) - theirs.logits(IDS)).max() < 0.1  # of bfloat16; others' weights are whole units off
        for ids in (IDS, IDS[::-1]):  # the second turn finds nothing left of the first in a cache
            turn = theirs.turn(ids, 5)
            assert len(turn.ids) == 6 and turn.prefill > 0 and turn.decode > 0
            assert turn.ids == Transformers(source, 32).turn(ids, 5).ids


def test_a_shape_whose_vocabulary_is_too_small_for_the_tokenizer_is_refused(tmp_path):
    ran = subprocess.run([sys.executable, "-m", "benchmarks.weights", str(tmp_path), "--random", "tiny"],
                         capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ran.returncode == 1 and "give --vocab-size 1280" in ran.stderr  # the demo's tokenizer has more than 512


def test_written_as_a_checkpoint_they_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("tools.make_checkpoint.put_tokenizer", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["weights", str(tmp_path), "--random", "tiny"])
    main()
    for name, tensor in Source(shape="tiny").model("bfloat16").state_dict().items():
        assert torch.equal(tensor, load_model(tmp_path, weights="fastest").state_dict()[name]), name
