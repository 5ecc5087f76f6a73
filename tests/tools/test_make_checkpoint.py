"""Random checkpoints: the published shapes and files, readable by others, reproducible, sane to run."""

import io
import json
import re
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from torch import Tensor

from llama.checkpoint.load import load_model
from llama.config import LlamaConfig
from llama.model.ragged import RaggedBatch
from llama.text.tokenizer import Tokenizer
from tests.oracles import meta_tokenizer_file
from tools import make_checkpoint
from tools.make_checkpoint import main, make_config, parse_bytes, random_tensor

ROOT = Path(__file__).parents[2]
PARAMETERS = {"8b": 8_030_261_248, "70b": 70_553_706_496, "405b": 405_853_388_800, "1b": 1_235_814_400,
              "3b": 3_212_749_824}
KV_BYTES = {"8b": 131_072, "70b": 327_680, "405b": 516_096, "1b": 32_768, "3b": 114_688}


def make(directory: Path, *arguments: str) -> Path:
    """Run the command for a tiny shape."""
    main([str(directory), "--shape", "tiny", *arguments])
    return directory


def read(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def rms(x: Tensor) -> float:
    return x.float().square().mean().sqrt().item()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_drawn_on_a_terminal(is_terminal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", stream)
    make(tmp_path)
    lines = stream.getvalue().split("\r")
    last = re.fullmatch(r"writing \[#{25}\] (\d+\.\d) of \1 MB, \d+\.\d GB/s\x1b\[K\n", lines[-1])
    assert bool(last) == (len(lines) > 1) == is_terminal


@pytest.mark.parametrize("shape", PARAMETERS)
def test_the_published_shapes(shape: str) -> None:
    config = LlamaConfig.from_dict(make_config(shape, {}))
    assert config.num_parameters == PARAMETERS[shape]
    assert config.kv_bytes_per_token() == KV_BYTES[shape]
    assert config.rope_scaling is not None
    assert config.rope_scaling.factor == (32 if shape in ("1b", "3b") else 8)
    assert config.tie_word_embeddings == (shape in ("1b", "3b"))
    assert (config.bos_token_id, config.eos_token_ids) == (128000, (128001, 128008, 128009))


def test_the_configuration_has_the_published_fields() -> None:
    published = ("architectures attention_bias attention_dropout bos_token_id eos_token_id hidden_act "
                 "hidden_size initializer_range intermediate_size max_position_embeddings mlp_bias "
                 "model_type num_attention_heads num_hidden_layers num_key_value_heads pretraining_tp "
                 "rms_norm_eps rope_scaling rope_theta tie_word_embeddings torch_dtype transformers_version "
                 "use_cache vocab_size").split()
    assert list(make_config("8b", {})) == published
    assert set(make_config("1b", {})) == {*published, "head_dim"}
    assert set(make_config("8b", {})["rope_scaling"]) == {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "rope_type"}


def test_8b_takes_the_published_bytes_in_four_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it but the writing: 16 GB of tensors are left out."""
    monkeypatch.setattr(make_checkpoint, "random_tensor", lambda *arguments: iter(()))
    monkeypatch.setattr("llama.checkpoint.save._check_room", lambda *arguments: None)
    main([str(tmp_path), "--shape", "8b"])
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 16_060_522_496}
    assert len(index["weight_map"]) == 291
    assert set(index["weight_map"].values()) == {f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128008, 128009],
        "temperature": 0.6, "top_p": 0.9, "transformers_version": "4.42.3"}


@pytest.mark.parametrize("arguments", [["--no-tie"], ["--tie"], ["--shard-bytes", "100KB"],
                                       ["--head-dim", "32"]],
                         ids=["untied", "tied", "sharded", "wide heads"])
def test_transformers_and_this_project_read_the_same_model(arguments: list[str], tmp_path: Path) -> None:
    make(tmp_path, "--dtype", "float32", *arguments)
    assert (tmp_path / "model.safetensors").exists() == ("--shard-bytes" not in arguments)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
    ids = torch.randint(0, 512, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    assert (load_model(tmp_path)(RaggedBatch.whole(ids)) - expected).abs().max() < 1e-4
    assert theirs.generation_config.eos_token_id == [257, 264, 265]


def test_a_tensor_depends_on_name_and_seed_alone(tmp_path: Path) -> None:
    first = files(make(tmp_path / "first"))
    assert files(make(tmp_path / "again")) == first
    assert files(make(tmp_path / "seed", "--seed", "1"))["model.safetensors"] != first["model.safetensors"]
    three = read(make(tmp_path / "three", "--layers", "3"))
    one = read(make(tmp_path / "one", "--layers", "1", "--shard-bytes", "50KB"))
    assert one.keys() < three.keys()
    assert all(tensor.equal(three[name]) for name, tensor in one.items())


@pytest.mark.parametrize("num_threads", [1, 5])
def test_blocks_are_the_same_by_any_number_of_threads(num_threads: int,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_checkpoint, "_BLOCK", 1000)
    shape = (130, 100)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(num_threads) as several:
        expected, blocks = (list(random_tensor("a.weight", shape, torch.bfloat16, 0, pool))
                            for pool in (one, several))
    assert [len(block) for block in blocks] == [1000] * 13
    assert torch.cat(blocks).equal(torch.cat(expected))
    assert len({tuple(block.tolist()) for block in blocks}) == 13


def test_few_blocks_are_made_before_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the disk is, a large tensor does not pile up in memory."""
    monkeypatch.setattr(make_checkpoint, "_BLOCK", 10)
    made = []

    class Pool(ThreadPoolExecutor):
        def submit(self, *arguments: object) -> Future[Tensor]:
            made.append(arguments)
            return super().submit(*arguments)

    with Pool(2) as pool:
        blocks = random_tensor("a.weight", (100, 100), torch.float32, 0, pool)
        next(blocks)
        assert len(made) < 20
        assert len(list(blocks)) == 999


def test_no_two_tensors_and_no_two_blocks_are_alike(tmp_path: Path) -> None:
    tensors = read(make(tmp_path))
    starts = {tuple(tensor.flatten()[:20].tolist()) for tensor in tensors.values()}
    assert len(starts) == len(tensors) == 21


def test_activations_stay_near_one_at_any_depth(tmp_path: Path) -> None:
    for layers in ("1", "40"):
        model = load_model(make(tmp_path / layers, "--layers", layers, "--dtype", "float32"))
        ids = torch.randint(0, 512, (64,), generator=torch.Generator().manual_seed(1))
        hidden = model.hidden(RaggedBatch.whole(ids))
        assert 0.3 < rms(hidden) < 3
        assert 0.3 < rms(model.logits(hidden)) < 3


def test_norms_are_near_one_and_matrices_are_centred(tmp_path: Path) -> None:
    for name, tensor in read(make(tmp_path, "--dtype", "float32")).items():
        if tensor.dim() == 1:
            assert (tensor - 1).abs().max() < 0.3 and tensor.std() > 0.01, name
        else:
            assert tensor.mean().abs() < 0.1 * tensor.std(), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_rounds_the_same_values(dtype: str, tmp_path: Path) -> None:
    exact = read(make(tmp_path / "exact", "--dtype", "float32"))
    rounded = read(make(tmp_path / "it", "--dtype", dtype))
    assert all(tensor.equal(exact[name].to(getattr(torch, dtype))) for name, tensor in rounded.items())
    assert json.loads((tmp_path / "it" / "config.json").read_text())["torch_dtype"] == dtype


def test_every_number_can_be_changed(tmp_path: Path) -> None:
    make(tmp_path, "--hidden-size", "24", "--layers", "1", "--heads", "6", "--kv-heads", "3", "--head-dim",
         "10", "--intermediate-size", "20", "--vocab-size", "300", "--tie")
    config = load_model(tmp_path).config
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (24, 1, 6, 3)
    assert (config.head_dim, config.intermediate_size, config.vocab_size) == (10, 20, 300)
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (44, (45, 52, 53))


def byte_level(path: Path) -> Path:
    """A tokenizer.json of the 256 bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: number for number, char in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin_of_text|>"])
    tokenizer.save(str(path))
    return path


def test_a_tokenizer_is_copied_with_what_lies_beside_it(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    byte_level(source / "tokenizer.json")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "tokenizer_config.json").write_text('{"bos_token": "<|begin_of_text|>"}')
    for name, given in (("by directory", source), ("by file", source / "tokenizer.json")):
        made = files(make(tmp_path / name, "--tokenizer", str(given)))
        assert {name: made[name] for name in files(source)} == files(source)


def test_a_tokenizer_alone_gets_the_chat_template_of_the_demo(tmp_path: Path,
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llama" / "demo").mkdir(parents=True)
    (tmp_path / "llama" / "demo" / "chat_template.jinja").write_text("the demo's")
    monkeypatch.setattr(make_checkpoint.llama, "__file__", str(tmp_path / "llama" / "__init__.py"))
    make(tmp_path / "out", "--tokenizer", str(byte_level(tmp_path / "tokenizer.json")))
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "the demo's"


def test_metas_tokenizer_becomes_tokenizer_json(tmp_path: Path) -> None:
    make(tmp_path, "--vocab-size", "128256", "--hidden-size", "8", "--heads", "2", "--kv-heads", "1",
         "--tokenizer", str(meta_tokenizer_file()))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("Hello, world!", bos=True) == [128000, 9906, 11, 1917, 0]
    assert load_model(tmp_path).config.vocab_size == tokenizer.vocab_size


REFUSED: list[tuple[list[str], str]] = [
    (["--heads", "3"], "num_attention_heads"),
    (["--layers", "0"], "num_layers is 0"),
    (["--tokenizer", "{tmp}/empty"], "holds neither tokenizer.json nor tokenizer.model"),
    (["--tokenizer", "{tmp}/none.json"], "No such file"),
    (["--tokenizer", "{tmp}/tokenizer.json", "--vocab-size", "256"], "--vocab-size 257"),
    (["--tokenizer", "{tmp}/broken.json"], "tokenizer.json"),
]


@pytest.mark.parametrize("arguments, fragment", REFUSED, ids=[fragment for _, fragment in REFUSED])
def test_errors_are_one_line(arguments: list[str], fragment: str, tmp_path: Path,
                             capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.json").write_text("{")
    byte_level(tmp_path / "tokenizer.json")
    with pytest.raises(SystemExit) as caught:
        make(tmp_path / "out", *(argument.format(tmp=tmp_path) for argument in arguments))
    error = capsys.readouterr().err
    assert caught.value.code == 1
    assert fragment in error and error.count("\n") == 1
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("300mb", 3 * 10**8), ("1.5KB", 1500),
                                        ("77", 77)])
def test_sizes_are_decimal(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "5 apples", "-1", "5GiB", "GB"])
def test_what_is_no_size_is_a_usage_error(text: str, tmp_path: Path,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        make(tmp_path, f"--shard-bytes={text}")
    assert caught.value.code == 2
    assert "is not a size such as 5GB" in capsys.readouterr().err


MEASURE = """
import sys
from tools.make_checkpoint import main

def memory(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

main([sys.argv[1] + "/first", "--shape", "tiny"])  # the libraries' own pages do not count
before = memory("VmRSS")
main([sys.argv[1], "--shape", "tiny", "--vocab-size", "128256", "--hidden-size", "1024", "--tie"])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_tensors_are_streamed_to_disk(tmp_path: Path) -> None:
    """The largest has 263 MB, of which only blocks are ever in memory."""
    outcome = run(["-c", MEASURE, str(tmp_path)])
    assert (tmp_path / "model.safetensors").stat().st_size > 260e6
    assert int(outcome.stdout.splitlines()[-1]) < 150e6


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=True, cwd=ROOT)


def test_the_command_says_what_it_made(tmp_path: Path) -> None:
    outcome = run(["-m", "tools.make_checkpoint", str(tmp_path), "--shape", "tiny"])
    total = sum(tensor.numel() for tensor in read(tmp_path).values())
    assert outcome.stdout == f"{tmp_path}: {total:,} parameters, {2 * total:,} bytes bfloat16\n"
    assert outcome.stderr == ""
