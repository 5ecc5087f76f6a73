"""`llama info`: numbers from the configuration and the headers, and what loading took."""

import json
import re
import subprocess
import sys

import pytest
import torch

from llama.checkpoint.save import save_model
from llama.commands import info
from llama.commands.report import size
from llama.config import LlamaConfig, RopeScaling
from llama.model.kernels import native
from llama.model.transformer import Llama
from tests.commands.small import make_checkpoint

GIB = 1 << 30
BIG = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
                  num_kv_heads=8, head_dim=128, max_position_embeddings=131072, rope_theta=5e5,
                  rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), rms_norm_eps=1e-5, tie_word_embeddings=False,
                  bos_token_id=128000, eos_token_ids=(128001, 128008, 128009))


@pytest.fixture
def big(tmp_path):
    """The configuration of 8B Instruct, without its weights."""
    (tmp_path / "config.json").write_text(json.dumps(BIG.to_dict()))
    return tmp_path


@pytest.fixture
def free(monkeypatch):
    """Sets what is free here, in GiB."""
    def set_free(amount):
        monkeypatch.setattr(info, "available_memory", lambda: int(amount * GIB))

    return set_free


def facts(ran):
    """The object that --json printed."""
    return json.loads(ran.out)


def test_the_numbers_of_8b_are_the_published_ones(llama, big, free):
    free(24)
    found = facts(llama("info", "--model", big, "--json"))
    assert found["parameters"] == 8_030_261_248
    assert found["weight_bytes"] == {"float32": 32_121_044_992, "bfloat16": 16_060_522_496, "float16": 16_060_522_496,
                                     "int8": 8_037_058_560, "int4": 5_414_307_840, "fp8": 8_037_058_560}
    assert found["kv_bytes_per_token"] == 131_072
    assert [row["tokens"] for row in found["contexts"]] == [8192, 32768, 131072]
    assert [row["kv_bytes"] for row in found["contexts"]] == [GIB, 4 * GIB, 16 * GIB]
    assert found["architecture"]["rope_scaling"]["factor"] == 8.0


def test_what_fits_follows_from_what_is_free(llama, big, free):
    weights = BIG.num_weight_bytes() + info.OVERHEAD_BYTES
    for extra, fits, contexts in ((-1, False, [False] * 3), (GIB, True, [True, False, False]),
                                  (4 * GIB - 1, True, [True, False, False]), (16 * GIB, True, [True] * 3)):
        free((weights + extra) / GIB)
        found = facts(llama("info", "--model", big, "--json"))
        assert found["fits"] is fits
        assert [row["fits"] for row in found["contexts"]] == contexts
        assert found["max_context"] == max(extra, 0) // 131_072
        assert found["default_context"] == max(extra, 0) // 131_072 // 2


def test_dtype_and_context_are_what_is_asked_about(llama, big, free):
    free(64)
    found = facts(llama("info", "--model", big, "--json", "--dtype", "float32", "--context", 20_000))
    assert found["kv_bytes_per_token"] == 262_144
    assert [row["tokens"] for row in found["contexts"]] == [8192, 20_000, 32768, 131072]
    assert found["needed_bytes"] == 32_121_044_992 + info.OVERHEAD_BYTES
    assert found["max_context"] == 20_000


def test_it_is_said_in_words(llama, big, free):
    free(20)
    ran = llama("info", "--model", big)
    for line in ("layers              32, 4,096 wide",
                 "attention           32 query heads of 128, 8 key and value heads, each shared by 4",
                 "feed-forward        SwiGLU, 14,336 wide",
                 "normalisation       RMSNorm, eps 1e-05",
                 "vocabulary          128,256 tokens, head of its own",
                 "positions           131,072 at most",
                 "rotary embedding    theta 500,000, Llama 3.1 scaling by 8 from 8,192 positions (frequency "
                 "factors 1 and 4)",
                 "begin, end ids      128000; 128001, 128008, 128009",
                 "parameters          8,030,261,248",
                 "weights on disk     not here as they should be",
                 "  in float32        29.92 GiB",
                 "  in bfloat16       14.96 GiB, the checkpoint's own",
                 "KV cache            131,072 bytes a token in bfloat16",
                 "       8,192     1.00 GiB    16.46 GiB    fits",
                 "     131,072    16.00 GiB    31.46 GiB    does not fit",
                 "free here           20.00 GiB",
                 "what fits           a context of 18,605 tokens; of 37,211 with --kv-cache for its 4.54 "
                 "GiB"):
        assert f"\n{line}\n" in ran.out, line


def test_which_kernel_multiplies_at_how_many_rows_is_said(llama, checkpoint, free, monkeypatch):
    free(1e-9)
    for has_tiles, int4 in ((True, [(1, "vectors"), (9, "matrix unit")]), (False, [(1, "vectors")])):
        monkeypatch.setattr(native, "_loaded", lambda: (object(), None))
        monkeypatch.setattr(native, "has_tiles", lambda: has_tiles)
        monkeypatch.setattr(native, "INT4_TILE_ROWS", 9)
        found = facts(llama("info", "--model", checkpoint, "--json"))["kernels"]
        assert (found["why_not"], found["matrix_unit"]) == (None, has_tiles)
        assert [(part["from_rows"], part["kernel"]) for part in found["formats"]["int4"]] == int4
        assert len(found["formats"]["bf16"]) == len(found["formats"]["int8"]) == 1
        said = llama("info", "--model", checkpoint).out
        unit = " and AMX, the matrix unit" if has_tiles else ""
        assert f"\n\ncompiled kernels    AVX-512{unit}\n  bf16              {int4[-1][1]}\n" in said
        assert ("\n  int4              vectors; from 9 rows on, matrix unit\n" in said) == has_tiles


def test_without_kernels_it_is_said_what_to_install(llama, checkpoint, free, monkeypatch):
    free(1e-9)
    monkeypatch.setattr(native, "_loaded", lambda: (None, "no C compiler is installed; install gcc or clang"))
    monkeypatch.setattr(native, "has_tiles", lambda: False)
    said = llama("info", "--model", checkpoint).out
    assert "\ncompiled kernels    none: no C compiler is installed; install gcc or clang\n  bf16              torch\n" in said
    assert "little memory, and much time\n" in said
    found = facts(llama("info", "--model", checkpoint, "--json"))["kernels"]
    assert found["formats"] == {name: [{"from_rows": 1, "kernel": "torch"}] for name in ("bf16", "int8", "int4")}
    assert facts(llama("info", "--model", checkpoint, "--json", "--no-load"))["kernels"] is None


def test_without_weights_the_configuration_is_shown_and_then_the_error(llama, big):
    ran = llama("info", "--model", big)
    assert ran.code == 1
    assert "8,030,261,248" in ran.out
    assert ran.err.startswith(f"llama: error: {big} holds neither model.safetensors nor ")


def test_weights_of_another_shape_are_an_error(llama, tmp_path):
    make_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 9}))
    ran = llama("info", "--model", tmp_path, "--no-load")
    assert (ran.code, "not here as they should be" in ran.out) == (1, True)
    assert "intermediate_size is 9 there and 8 here" in ran.err


def test_it_loads_and_generates_where_that_fits_without_a_tokenizer(llama, tmp_path):
    make_checkpoint(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    ran = llama("info", "--model", tmp_path)
    assert (ran.code, ran.err) == (0, "")
    assert re.search(r"\nloaded in +\d+\.\d\d s\n"
                     r"generated +16 tokens, the first after \d+\.\d+ s, then [\d.,]+ tokens/s\n"
                     r"peak memory +[\d.]+ [MG]iB, [\d.]+ [MG]iB of it before loading\n$", ran.out)
    found = facts(llama("info", "--model", tmp_path, "--json"))
    assert found["loaded"]["generated"] == 16
    assert found["loaded"]["weight_bytes"] == found["weight_bytes"]["float32"] == found["stored"]["bytes"]
    assert found["loaded"]["peak_bytes"] >= found["loaded"]["before_bytes"] > 0
    assert found["loaded"]["within_bound"] is None


def test_the_dtype_is_that_which_is_loaded(llama, checkpoint):
    found = facts(llama("info", "--model", checkpoint, "--json", "--dtype", "bfloat16"))
    assert found["loaded"]["weight_bytes"] == found["weight_bytes"]["bfloat16"]


def test_a_model_of_some_size_is_held_to_the_bound(llama, checkpoint, monkeypatch):
    monkeypatch.setattr(info, "BOUNDED_BYTES", 0)
    ran = llama("info", "--model", checkpoint)
    assert re.search(r"\n {20}\d+\.\d{3} times the weights, ABOVE the bound of 1\.15\n$", ran.out)
    monkeypatch.setattr(info, "PEAK_BOUND", 1e6)
    ran = llama("info", "--model", checkpoint)
    assert " times the weights, within the bound of 1e+06\n" in ran.out


def test_what_does_not_fit_is_not_loaded_unless_asked(llama, checkpoint, free):
    free(0.25)
    ran = llama("info", "--model", checkpoint)
    assert (ran.code, "loaded in" in ran.out) == (0, False)
    assert "what fits           nothing: the weights alone need more\n" in ran.out
    assert ran.err == "not loaded: it takes 514 MiB and 256 MiB are free; --load tries it all the same\n"
    assert "loaded in" in llama("info", "--model", checkpoint, "--load").out
    free(24)
    ran = llama("info", "--model", checkpoint, "--no-load")
    assert ("loaded in" in ran.out, ran.err) == (False, "")


def test_the_weights_do_not_count_twice_while_they_are_loaded(tmp_path):
    config = LlamaConfig(**{**vars(BIG), "vocab_size": 20_000, "hidden_size": 2048, "num_layers": 1,
                            "intermediate_size": 8192})
    model = Llama(config, torch.bfloat16, "cpu")
    for parameter in model.parameters():
        parameter.detach().zero_()
    save_model(model, tmp_path)
    # In a process of its own, whose peak is nothing but this.
    ran = subprocess.run([sys.executable, "-m", "llama", "info", "--json", "--model", tmp_path],
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    loaded = json.loads(ran.stdout)["loaded"]
    assert loaded["weight_bytes"] == config.num_weight_bytes()
    assert loaded["peak_bytes"] - loaded["before_bytes"] <= 1.15 * loaded["weight_bytes"]


@pytest.mark.parametrize("num_bytes, text", [
    (0, "0 bytes"), (1023, "1023 bytes"), (1024, "1.0 KiB"), (102_400, "100 KiB"), (1536 * 1024, "1.5 MiB"),
    (16_060_522_496, "14.96 GiB"), (900 * GIB, "900 GiB"), (1600 * GIB, "1.56 TiB"),
    (5000 * 1024 * GIB, "5000 TiB")])
def test_sizes_in_words(num_bytes, text):
    assert size(num_bytes) == text
