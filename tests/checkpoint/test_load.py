"""Loading against transformers: the same bits, in any dtype, however the files are cut, in bounded memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from llama.checkpoint.lanes import HostLane
from llama.checkpoint.layout import places
from llama.checkpoint.load import load_model
from llama.checkpoint.save import write_checkpoint
from llama.config import LlamaConfig
from llama.model.ragged import RaggedBatch
from tests.checkpoint.drafts import (CONFIG, EMBED, FIRST, HEAD, INDEX, SECOND, Draft, hugging_face, layer,
                                     published_shapes)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def joined(theirs: dict[str, Tensor], num_layers: int, tied: bool) -> dict[str, Tensor]:
    """Published tensors as our parameters, spelled out by hand."""
    ours = {"embed.weight": theirs[EMBED], "norm.weight": theirs["model.norm.weight"]}
    if not tied:
        ours["head.weight"] = theirs[HEAD]
    for n in range(num_layers):
        ours[f"blocks.{n}.attention.qkv.weight"] = torch.cat(
            [theirs[layer(n, f"self_attn.{part}_proj")] for part in "qkv"])
        ours[f"blocks.{n}.attention.out.weight"] = theirs[layer(n, "self_attn.o_proj")]
        ours[f"blocks.{n}.feed_forward.gate_up.weight"] = torch.cat(
            [theirs[layer(n, f"mlp.{part}_proj")] for part in ("gate", "up")])
        ours[f"blocks.{n}.feed_forward.down.weight"] = theirs[layer(n, "mlp.down_proj")]
        ours[f"blocks.{n}.attention_norm.weight"] = theirs[layer(n, "input_layernorm")]
        ours[f"blocks.{n}.feed_forward_norm.weight"] = theirs[layer(n, "post_attention_layernorm")]
    return ours


def assert_same(model: torch.nn.Module, expected: dict[str, Tensor]) -> None:
    """The same parameters, to the bit and in the dtype."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert parameter.dtype == expected[name].dtype
        assert parameter.equal(expected[name]), name


@pytest.mark.parametrize("shard_size", ["1GB", "20KB", "1KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_what_transformers_saves_is_loaded_bit_by_bit(dtype: torch.dtype, tied: bool, shard_size: str,
                                                      tmp_path: Path) -> None:
    theirs = hugging_face(tied, dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / INDEX).exists() == (shard_size != "1GB")
    assert_same(load_model(tmp_path), joined(theirs.state_dict(), 3, tied))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_loaded_model_computes_what_transformers_computes(tied: bool, tmp_path: Path) -> None:
    theirs = hugging_face(tied, torch.float32)
    theirs.save_pretrained(tmp_path)
    ids = torch.randint(0, 96, (40,), generator=torch.Generator().manual_seed(1))
    ours = load_model(tmp_path)(RaggedBatch.whole(ids))
    assert (ours - theirs(ids[None]).logits[0]).abs().max() < 1e-4


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_tensors_are_rounded_to_the_dtype_asked_for(stored: str, target: str, tmp_path: Path) -> None:
    theirs = hugging_face(dtype=DTYPES[stored])
    theirs.save_pretrained(tmp_path)
    expected = joined(theirs.state_dict(), 3, tied=False)
    model = load_model(tmp_path, dtype=target)
    assert model.dtype == DTYPES[target]
    assert_same(model, {name: tensor.to(DTYPES[target]) for name, tensor in expected.items()})


def test_the_dtype_of_the_configuration_is_the_default(tmp_path: Path) -> None:
    draft = Draft()
    draft.config["torch_dtype"] = "float16"
    draft.write(tmp_path)
    assert load_model(tmp_path).dtype == torch.float16


def test_tensors_of_different_dtypes_may_lie_in_one_file(tmp_path: Path) -> None:
    tensors = {name: torch.randn(shape, dtype=torch.float32 if len(shape) == 1 else torch.float16)
               for name, shape in published_shapes().items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert_same(load_model(tmp_path, dtype="float32"),
                joined({name: tensor.float() for name, tensor in tensors.items()}, 2, tied=False))


def test_a_joined_weight_may_straddle_two_shards(tmp_path: Path) -> None:
    Draft().write(tmp_path)
    theirs = {}
    for shard in (FIRST, SECOND):
        theirs |= safetensors.torch.load_file(tmp_path / shard)
    with safetensors.safe_open(tmp_path / FIRST, "pt") as first:
        assert layer(1, "self_attn.k_proj") in first.keys()
        assert layer(1, "self_attn.v_proj") not in first.keys()
    assert_same(load_model(tmp_path), joined(theirs, 2, tied=False))


def test_pieces_of_a_few_rows_give_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large matrices are read piece by piece, of which these small ones have only one otherwise."""
    Draft().write(tmp_path)
    whole = {dtype: dict(load_model(tmp_path, dtype=dtype).named_parameters()) for dtype in DTYPES}
    monkeypatch.setattr(HostLane, "piece_bytes", 50)  # three rows of 16 bytes
    for dtype, expected in whole.items():
        assert_same(load_model(tmp_path, dtype=dtype), expected)


def test_what_a_file_holds_for_a_tied_head_is_ignored(tmp_path: Path) -> None:
    draft = Draft()
    draft.config["tie_word_embeddings"] = True
    draft.write(tmp_path)
    model = load_model(tmp_path)
    assert model.head.weight is model.embed.weight
    embedding = safetensors.torch.load_file(tmp_path / FIRST)[EMBED]
    assert model.head.weight.equal(embedding)
    assert not safetensors.torch.load_file(tmp_path / SECOND)[HEAD].equal(embedding)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq",
                                  "model.rotary_emb.inv_freq"])
def test_rotary_frequencies_of_old_exports_are_ignored(name: str, tmp_path: Path) -> None:
    draft = Draft()
    draft.write(tmp_path)
    expected = dict(load_model(tmp_path).named_parameters())
    draft.add(SECOND, name, [1], "F32", 4)
    draft.weight_map[name] = SECOND
    draft.write(tmp_path)
    assert_same(load_model(tmp_path), expected)


def test_hidden_files_are_no_weights(tmp_path: Path) -> None:
    Draft().write(tmp_path)
    (tmp_path / f"._{FIRST}").write_bytes(b"left by macOS")
    load_model(tmp_path)


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    Draft().write(plain)
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(plain.iterdir()):
        (repository / "blobs" / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    expected = dict(load_model(plain).named_parameters())
    assert_same(load_model(snapshot), expected)
    (tmp_path / "link").symlink_to(snapshot)
    assert_same(load_model(tmp_path / "link"), expected)


def test_links_within_a_directory_are_followed(tmp_path: Path) -> None:
    Draft().write(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / FIRST).rename(tmp_path / "elsewhere" / "data")
    (tmp_path / FIRST).symlink_to(Path("elsewhere", "data"))
    load_model(tmp_path)


@pytest.mark.parametrize("progress, shown", [(True, True), (False, False), (None, False)])
def test_the_bar_is_drawn_on_a_terminal_or_on_request(progress: bool | None, shown: bool, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:
    Draft().write(tmp_path)
    load_model(tmp_path, progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert bool(re.search(r"\rloading \[#{25}\] 0\.\d of (0\.\d) MB, \d+\.\d GB/s\x1b\[K\n\Z", captured.err)) == shown
    assert captured.err.count("\n") == shown
    assert shown or captured.err == ""


# About 240 MB in bfloat16, of which the embedding alone is more than the 15% that may come on top.
LARGE = {**CONFIG, "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096,
         "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 4,
         "tie_word_embeddings": True}
MEASURE = """
import sys
from llama.checkpoint.load import load_model

def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

before = memory("VmRSS")
model = load_model(sys.argv[1], dtype=sys.argv[2])
weights = sum(parameter.nbytes for parameter in model.parameters())
print((memory("VmHWM") - before) / weights, weights)
"""


@pytest.fixture(scope="module")
def large_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("large")
    config = LlamaConfig.from_dict(LARGE)
    block = torch.randn(1 << 20).bfloat16()

    def pieces(name: str) -> list[Tensor]:
        size = torch.Size(shapes[name]).numel()
        return [block[: min(len(block), size - first)] for first in range(0, size, len(block))]

    shapes = {name: place.shape for name, place in places(config).items()}
    write_checkpoint(directory, LARGE, shapes, "bfloat16", pieces)
    return directory


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("dtype", DTYPES)
def test_peak_memory_is_at_most_1_15_times_the_weights(dtype: str, large_checkpoint: Path) -> None:
    outcome = subprocess.run([sys.executable, "-c", MEASURE, str(large_checkpoint), dtype],
                             capture_output=True, text=True, check=True)
    ratio, num_bytes = map(float, outcome.stdout.split())
    assert num_bytes > 200e6
    assert 0.9 < ratio < 1.15
