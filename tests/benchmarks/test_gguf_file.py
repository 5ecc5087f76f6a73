"""GGUF files of our checkpoints: llama.cpp computes the same from them."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from benchmarks.contestants import Distant, LlamaCpp, Ours
from benchmarks.gguf_file import gguf_files, gguf_name, rope_factors, write_gguf
from benchmarks.weights import Source
from llama.checkpoint.layout import places
from llama.config import LlamaConfig
from tests.reference import frequencies
from tools.make_checkpoint import main as make_checkpoint
from tools.make_checkpoint import make_config

HAS_BENCH = all(importlib.util.find_spec(name) for name in ("gguf", "llama_cpp"))
needs_bench = pytest.mark.skipif(not HAS_BENCH, reason="needs the `bench` extra, which has llama-cpp-python and gguf")
SHAPE = ["--shape", "tiny", "--hidden-size", "256", "--heads", "8", "--kv-heads", "2", "--head-dim", "64",
         "--intermediate-size", "512"]


@pytest.mark.parametrize("shape", ["8b", "1b"])
def test_what_frequencies_are_divided_by(shape):
    raw = make_config(shape, {})
    plain, scaled = frequencies(raw | {"rope_scaling": None}), frequencies(raw)
    assert rope_factors(LlamaConfig.from_dict(raw)) == pytest.approx(np.array(plain) / scaled, rel=1e-5)


def test_every_tensor_has_another_name():
    config = LlamaConfig.from_dict(make_config("8b", {}))
    names = {gguf_name(name) for name in places(config)}
    assert len(names) == len(places(config)) == 291
    assert {"token_embd.weight", "output.weight", "output_norm.weight", "blk.31.attn_q.weight"} < names


def logits_of(make, arguments, prompt):
    """Those of a contestant in a process of its own."""
    contestant = Distant(make, arguments, num_threads=1)
    try:
        return contestant.ask("logits", prompt)
    finally:
        contestant.close()


@needs_bench
@pytest.mark.parametrize("tie", ["--tie", "--no-tie"])
def test_llama_cpp_computes_the_same(tmp_path, tie):
    """The scaling of rotary frequencies begins early here, so that a prompt of 100 tokens shows it."""
    make_checkpoint([str(tmp_path), *SHAPE, tie])
    config = json.loads((tmp_path / "config.json").read_text())
    config["rope_scaling"]["original_max_position_embeddings"] = 32
    config["rope_theta"] = 100.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    files = gguf_files(tmp_path, tmp_path / "gguf", ["BF16", "Q8_0", "Q4_0"])
    prompt = torch.randint(0, 512, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = logits_of(Ours, (Source(tmp_path), {"dtype": "float32"}, 128), prompt)
    off = {kind: (logits_of(LlamaCpp, (path, 128), prompt) - expected).std() / expected.std()
           for kind, path in files.items()}
    assert off["BF16"] < 0.01 < off["Q8_0"] * 2 < 0.08 < off["Q4_0"] < 0.5


@needs_bench
def test_another_dtype_is_refused(tmp_path):
    make_checkpoint([str(tmp_path), "--shape", "tiny", "--dtype", "float16"])
    with pytest.raises(ValueError, match="model.safetensors: tensor 'model.embed_tokens.weight' is F16; only bfloat16"):
        write_gguf(tmp_path, tmp_path / "out.gguf")
