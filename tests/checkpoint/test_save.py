"""Saving: there and back bit by bit, readable by transformers and safetensors, whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers

from llama.checkpoint import save
from llama.checkpoint.layout import places
from llama.checkpoint.load import load_model
from llama.checkpoint.safetensors import CheckpointError
from llama.checkpoint.save import save_model
from llama.config import LlamaConfig
from llama.model.transformer import Llama
from tests.checkpoint.drafts import FIRST, INDEX, SECOND, Draft, hugging_face

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AS_8B = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
                    num_kv_heads=8, head_dim=128, max_position_embeddings=131072, rope_theta=500000.0,
                    rope_scaling=None, rms_norm_eps=1e-5, tie_word_embeddings=False)


def loaded(theirs: transformers.LlamaForCausalLM, directory: Path) -> Llama:
    """transformers' model as ours."""
    theirs.save_pretrained(directory)
    return load_model(directory)


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    parameters, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert parameters.keys() == expected.keys()
    assert all(parameter.equal(expected[name]) for name, parameter in parameters.items())


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000, 1], ids=["one file", "shards", "a shard a tensor"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_there_and_back_bit_by_bit(dtype: torch.dtype, tied: bool, shard_bytes: int, tmp_path: Path) -> None:
    model = loaded(hugging_face(tied, dtype), tmp_path / "theirs")
    save_model(model, tmp_path / "ours", max_shard_bytes=shard_bytes)
    again = load_model(tmp_path / "ours")
    assert_same(again, model)
    assert again.dtype == dtype
    assert again.config == model.config


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one file", "shards"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_transformers_reads_what_is_saved(tied: bool, shard_bytes: int, tmp_path: Path) -> None:
    theirs = hugging_face(tied, torch.float32)
    save_model(loaded(theirs, tmp_path / "theirs"), tmp_path / "ours", max_shard_bytes=shard_bytes)
    again, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto",
                                                                  output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same(again, theirs)
    ids = torch.arange(50)[None]
    assert again(ids).logits.equal(theirs(ids).logits)
    assert again.config.rope_parameters == theirs.config.rope_parameters
    assert again.config.eos_token_id == [1]


def test_the_dtype_written_is_that_of_the_model(tmp_path: Path) -> None:
    loaded(hugging_face(dtype=torch.bfloat16), tmp_path / "theirs")
    save_model(load_model(tmp_path / "theirs", dtype="float32"), tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["torch_dtype"] == "float32"
    tensors = safetensors.torch.load_file(tmp_path / "ours" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_one_file_has_no_index_and_shards_have(tmp_path: Path) -> None:
    model = loaded(hugging_face(), tmp_path / "theirs")
    save_model(model, tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"config.json", "model.safetensors"}
    save_model(model, tmp_path / "two", max_shard_bytes=50_000)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"config.json", FIRST, SECOND, INDEX}
    index = json.loads((tmp_path / "two" / INDEX).read_text())
    assert index["metadata"] == {"total_size": model.config.num_weight_bytes("bfloat16")}
    for shard in (FIRST, SECOND):
        with safetensors.safe_open(tmp_path / "two" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == {name for name, place in index["weight_map"].items() if place == shard}


@pytest.mark.parametrize("shard_size", ["50KB", "20KB", "7KB"])
def test_shards_are_cut_where_transformers_cuts_them(shard_size: str, tmp_path: Path) -> None:
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    num_bytes = int(shard_size.removesuffix("KB")) * 1000
    save_model(load_model(tmp_path / "theirs"), tmp_path / "ours", max_shard_bytes=num_bytes)
    maps = [json.loads((tmp_path / whose / INDEX).read_text())["weight_map"] for whose in ("ours", "theirs")]
    assert maps[0] == maps[1]


def test_8b_is_cut_as_published() -> None:
    """Into four files, whose sizes on the hub are 4.98, 5.00, 4.92 and 1.17 GB."""
    sizes = {name: 2 * torch.Size(place.shape).numel() for name, place in places(AS_8B).items()}
    shards = save._plan_shards(sizes, save.MAX_SHARD_BYTES)
    assert [sum(sizes[name] for name in names) for names in shards] == [
        4_976_689_152, 4_999_790_592, 4_915_904_512, 1_168_138_240]
    assert shards[0][-1] == "model.layers.8.post_attention_layernorm.weight"
    assert shards[1][-1] == "model.layers.20.mlp.gate_proj.weight"


def test_a_model_that_was_saved_before_is_replaced(tmp_path: Path) -> None:
    first = loaded(hugging_face(), tmp_path / "theirs")
    for shard_bytes in (10**9, 50_000):
        directory = tmp_path / str(shard_bytes)
        save_model(first, directory, max_shard_bytes=shard_bytes)
        (directory / "tokenizer.json").write_text("{}")
        second = load_model(directory)
        second.embed.weight.mul_(2)
        save_model(second, directory, max_shard_bytes=shard_bytes)
        assert_same(load_model(directory), second)
        assert (directory / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("other", [FIRST, "adapter_model.safetensors"])
def test_other_weights_in_the_directory_are_not_mixed_with(other: str, tmp_path: Path) -> None:
    model = loaded(hugging_face(), tmp_path / "theirs")
    directory = tmp_path / "ours"
    directory.mkdir()
    (directory / other).write_bytes(b"precious")
    with pytest.raises(CheckpointError, match=f"{other} lies in the way.*choose an empty directory"):
        save_model(model, directory)
    assert [(path.name, path.read_bytes()) for path in directory.iterdir()] == [(other, b"precious")]


def test_a_disk_that_is_too_small_is_refused_before_writing(tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(hugging_face(), tmp_path / "theirs")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 999, 1))
    with pytest.raises(CheckpointError, match=r"ours has 0\.0 GB free, but the weights take 0\.0 GB"):
        save_model(model, tmp_path / "ours")
    assert not list((tmp_path / "ours").iterdir())


@pytest.mark.parametrize("shard_bytes", [10**9, 50_000], ids=["one file", "shards"])
def test_a_failure_leaves_what_was_there(shard_bytes: int, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(hugging_face(), tmp_path / "theirs")
    directory = tmp_path / "ours"
    save_model(model, directory, max_shard_bytes=shard_bytes)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}

    def fail(*arguments: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(save, "_as_json", fail)  # the weights are written by then
    model.embed.weight.mul_(2)
    with pytest.raises(CheckpointError, match="ours cannot be written: No space left on device"):
        save_model(model, directory, max_shard_bytes=shard_bytes)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


def test_shards_are_named_before_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two, the directory is refused rather than misread."""
    model = loaded(hugging_face(), tmp_path / "theirs")
    directory = tmp_path / "ours"
    save_model(model, directory, max_shard_bytes=50_000)
    rename = Path.replace

    def fail_for_the_second_shard(path: Path, target: Path) -> Path:
        if target.name == SECOND:
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", fail_for_the_second_shard)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_model(model, directory, max_shard_bytes=50_000)
    with pytest.raises(CheckpointError, match="download the index"):
        load_model(directory)
    assert not list(directory.glob("*.partial"))


def test_a_file_in_the_place_of_the_directory_is_an_error(tmp_path: Path) -> None:
    model = loaded(hugging_face(), tmp_path / "theirs")
    (tmp_path / "ours").write_text("")
    with pytest.raises(CheckpointError, match="ours cannot be written: File exists"):
        save_model(model, tmp_path / "ours")


@pytest.mark.parametrize("less", [0, 1])
def test_a_shard_is_filled_to_the_last_byte_and_no_further(less: int, tmp_path: Path) -> None:
    """As huggingface_hub would do it, and as the files that tests write by hand are."""
    draft = Draft()
    draft.write(tmp_path)
    num_bytes = len(draft.data[FIRST]) - less
    save_model(load_model(tmp_path), tmp_path / "ours", max_shard_bytes=num_bytes)
    assert (tmp_path / "ours" / FIRST).read_bytes().endswith(draft.data[FIRST]) == (less == 0)
    tensors = safetensors.torch.load_file(tmp_path / FIRST) | safetensors.torch.load_file(tmp_path / SECOND)
    order = {name: tensors[name] for name in places(load_model(tmp_path).config)}
    plan = huggingface_hub.split_torch_state_dict_into_shards(order, max_shard_size=num_bytes)
    assert plan.tensor_to_filename == json.loads((tmp_path / "ours" / INDEX).read_text())["weight_map"]
