"""Quantised on load and stored quantised: the rounded weights' own logits, there and back by the byte, and what is refused."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from llama.checkpoint import load
from llama.checkpoint.lanes import HostLane
from llama.checkpoint.layout import places
from llama.checkpoint.load import load_model
from llama.checkpoint.safetensors import CheckpointError
from llama.checkpoint.save import save_model
from llama.model import linear
from llama.model.device_linear import DeviceLinear
from llama.model.formats import BF16, FORMATS, FP8, INT4, INT8, Format
from llama.model.linear import Linear, PackedLinear
from llama.model.ragged import RaggedBatch
from llama.model.transformer import Llama
from tests.checkpoint.drafts import hugging_face
from tests.reference import logits

# Every matrix of it can lie in blocks; and one of which some cannot: k and v have 16 rows, which q has not.
SHAPE = {"vocab_size": 160, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4,
         "num_key_value_heads": 2, "num_hidden_layers": 2}
PARTLY = SHAPE | {"head_dim": 16, "num_key_value_heads": 1, "intermediate_size": 100}
FORMAT = pytest.mark.parametrize("name", ["int8", "int4"])
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
GATE, EMBED, Q = "model.layers.0.mlp.gate_proj.weight", "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"
IDS = torch.randint(0, 160, (21,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """In bfloat16, untied and tied, by transformers."""
    found = {}
    for tied in (False, True):
        found[tied] = tmp_path_factory.mktemp("tied" if tied else "untied")
        hugging_face(tied, **SHAPE).save_pretrained(found[tied])
    return found


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(directory / "model.safetensors")


def rounded(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Published tensors with every matrix rounded by itself: embedding and head to int8, the others to the format."""
    found = {}
    for key, tensor in tensors.items():
        fmt = None if tensor.dim() == 1 else INT8 if key in (EMBED, "lm_head.weight") and name != "bf16" else FORMATS[name]
        found[key] = tensor.float() if fmt is None else fmt.unpack(*fmt.pack(tensor))
    return found


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return model.state_dict()


def assert_same(model: Llama, other: Llama) -> None:
    """The same bits under the same names."""
    assert state(model).keys() == state(other).keys()
    assert all(tensor.equal(state(other)[name]) for name, tensor in state(model).items())


# ---- what a packed model computes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name, tolerance", [("bf16", 0.02), ("int8", 0.08), ("int4", 0.08)])
@TIED
def test_logits_are_those_of_the_rounded_weights(name: str, tolerance: float, tied: bool, checkpoints: dict[bool, Path]
                                                 ) -> None:
    """Against float64 arithmetic on the weights as rounded; what remains is the rounding of activations."""
    model = load_model(checkpoints[tied], dtype="float32", weights=name)
    config = json.loads((checkpoints[tied] / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config |= {"rope_theta": parameters["rope_theta"], "rope_scaling": parameters}
    expected = logits(rounded(tensors_of(checkpoints[tied]), name), config, IDS.tolist())
    found = model(RaggedBatch.whole(IDS)).double()
    assert (found - expected).norm() < tolerance * expected.norm()
    assert model.config.quantization == (None if name == "bf16" else name)
    assert (model.head is model.embed) == tied


@FORMAT
@TIED
def test_which_matrix_has_which_format(name: str, tied: bool, checkpoints: dict[bool, Path]) -> None:
    model = load_model(checkpoints[tied], weights=name)
    block = model.blocks[0]
    assert {model.embed.format, model.head.format} == {INT8}
    inner = (block.attention.qkv, block.attention.out, block.feed_forward.gate_up, block.feed_forward.down)
    assert {linear.format for linear in inner} == {FORMATS[name]}
    assert model.num_bytes == model.config.num_weight_bytes(quantize=name)
    packed = load_model(checkpoints[tied], weights="bf16")
    assert packed.head.format is BF16 and packed.num_bytes == packed.config.num_weight_bytes()
    assert isinstance(packed.embed, PackedLinear) == tied  # rows are looked up fastest as they are


def test_matrices_that_cannot_lie_in_blocks_stay_as_they_are(tmp_path: Path) -> None:
    theirs = hugging_face(**PARTLY)
    theirs.save_pretrained(tmp_path)
    plain, tensors = load_model(tmp_path), tensors_of(tmp_path)
    for name in FORMATS:
        model = load_model(tmp_path, weights=name)
        layer = model.blocks[1]
        assert isinstance(layer.attention.qkv, Linear) and isinstance(layer.attention.out, PackedLinear)
        assert isinstance(layer.feed_forward.gate_up, Linear) and isinstance(layer.feed_forward.down, Linear)
        assert layer.attention.qkv.weight.equal(plain.blocks[1].attention.qkv.weight)
        out = layer.attention.out
        expected = rounded({"out": tensors["model.layers.1.self_attn.o_proj.weight"]}, name)["out"]
        assert out.format.unpack(out.blocks, out.scale).equal(expected)


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_an_embedding_are_its_rounded_rows(name: str, dtype: str, checkpoints: dict[bool, Path]) -> None:
    embed = load_model(checkpoints[True], dtype=dtype, weights=name).embed
    expected = rounded(tensors_of(checkpoints[True]), name)[EMBED].to(getattr(torch, dtype))
    ids = torch.tensor([159, 0, 17, 16, 15, 17])
    assert embed.rows(ids).equal(expected[ids])


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
def test_gradients_of_x_are_those_of_the_rounded_weights(fmt: Format) -> None:
    linear = PackedLinear(128, 96, torch.float32, fmt)
    w = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    linear.store(0, w)
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
    linear(x).square().sum().backward()
    again = x.detach().double().requires_grad_()
    F.linear(again, fmt.unpack(*fmt.pack(w)).double()).square().sum().backward()
    assert (x.grad - again.grad).abs().max() < 1e-5 * again.grad.abs().max()
    with torch.no_grad():  # the same as where no gradient is wanted: x is rounded
        assert linear(x).equal(linear(x.detach()))
    assert (linear(x) - linear(x.detach())).abs().max() > (1e-2 if fmt is not BF16 else 1e-4)


def test_small_pieces_give_the_same_blocks(checkpoints: dict[bool, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {name: load_model(checkpoints[False], weights=name) for name in FORMATS}
    monkeypatch.setattr(HostLane, "packed_bytes", 1)  # one block each
    for name, model in whole.items():
        assert_same(load_model(checkpoints[False], weights=name), model)


# ---- stored ----------------------------------------------------------------------------------------------------------


@FORMAT
@TIED
@pytest.mark.parametrize("shape", [SHAPE, PARTLY], ids=["all", "partly"])
@pytest.mark.parametrize("shard_bytes", [10**9, 1000], ids=["one file", "shards"])
def test_there_and_back_bit_by_bit(name: str, tied: bool, shape: dict[str, int], shard_bytes: int, tmp_path: Path) -> None:
    hugging_face(tied, **shape).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", weights=name)
    save_model(model, tmp_path / "ours", max_shard_bytes=shard_bytes)
    again = load_model(tmp_path / "ours")
    assert_same(again, model)
    assert again.config == model.config and again.config.quantization == name
    assert_same(load_model(tmp_path / "ours", weights=name), model)
    assert again(RaggedBatch.whole(IDS)).equal(model(RaggedBatch.whole(IDS)))


def test_a_matrix_on_disk_is_its_blocks_and_scales(checkpoints: dict[bool, Path], tmp_path: Path) -> None:
    save_model(load_model(checkpoints[False], weights="int4"), tmp_path)
    tensors, exact = tensors_of(tmp_path), tensors_of(checkpoints[False])
    for name, fmt in ((Q, INT4), (EMBED, INT8)):
        blocks, scale = fmt.pack(exact[name])
        assert tensors[name].equal(blocks)
        assert (f"{name}_scale" in tensors) == fmt.has_scale
        assert scale is None or tensors[f"{name}_scale"].equal(scale)
    assert tensors["model.norm.weight"].equal(exact["model.norm.weight"])
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings == {"quant_method": "llama-runtime", "format": "int4"}


def test_packed_bf16_is_saved_as_it_was_read(checkpoints: dict[bool, Path], tmp_path: Path) -> None:
    save_model(load_model(checkpoints[True], weights="bf16"), tmp_path)
    saved, exact = tensors_of(tmp_path), tensors_of(checkpoints[True])
    assert saved.keys() == exact.keys() and all(tensor.equal(exact[name]) for name, tensor in saved.items())


def test_places_of_a_quantised_checkpoint_are_those_of_its_model(checkpoints: dict[bool, Path]) -> None:
    config = dataclasses.replace(load_model(checkpoints[False]).config, quantization="int8")
    model = Llama(config, torch.bfloat16, weights="int8")
    filled = dict.fromkeys(state(model), 0)
    for place in places(config).values():
        filled[place.parameter] += place.shape[0]
    assert filled == {name: tensor.shape[0] for name, tensor in state(model).items()}


# ---- refused ---------------------------------------------------------------------------------------------------------


def refusal(directory: Path, **options: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(directory, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """One tensor of the file in another way; None takes it out."""
    def spoil(directory: Path) -> None:
        tensors = tensors_of(directory)
        changed = change(tensors.pop(name))
        if changed is not None:
            tensors[name] = changed.contiguous()
        safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return spoil


def with_settings(settings: object) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
    return spoil


OTHERS = "is not supported; get the checkpoint as it was trained, and round it here: llama quantize, or --quantize int8 or int4"
SPOILED = {
    "blocks of another dtype": (with_tensor(GATE, Tensor.bfloat16), f"tensor '{GATE}' has dtype BF16, and the "
                                "configuration asks for U8; use the configuration that belongs to these weights"),
    "scales of another dtype": (with_tensor(f"{EMBED}_scale", Tensor.half), f"tensor '{EMBED}_scale' has dtype F16, and "
                                "the configuration asks for F32"),
    "a norm of bytes": (with_tensor("model.norm.weight", Tensor.byte), "tensor 'model.norm.weight' has dtype U8, and the "
                        "configuration asks for F32, BF16, F16"),
    "a block too few": (with_tensor(GATE, lambda blocks: blocks[1:]), f"tensor '{GATE}' has shape [11, 1280], but the "
                        "configuration asks for [12, 1280]: blocks of intermediate_size is 12 there and 11 here"),
    "blocks of another size": (with_tensor(GATE, lambda blocks: blocks[:, 64:]), "[12, 1216], but the configuration asks "
                               "for [12, 1280]: blocks of hidden_size is 1280 there and 1216 here"),
    "a scale too few": (with_tensor(f"{EMBED}_scale", lambda scale: scale[1:]), f"tensor '{EMBED}_scale' has shape [159], "
                        "but the configuration asks for [160]: vocab_size is 160 there and 159 here"),
    "no scales": (with_tensor(f"{EMBED}_scale", lambda scale: None), f"tensor '{EMBED}_scale' is in none of the files"),
    "no blocks": (with_tensor(Q, lambda blocks: None), f"tensor '{Q}' is in none of the files"),
    "another of our formats": (with_settings({"quant_method": "llama-runtime", "format": "int8"}),
                               "has shape [8, 1280], but the configuration asks for [8, 2048]: blocks of hidden_size is "
                               "2048 there and 1280 here"),
    "no format": (with_settings(None), "has dtype U8, and the configuration asks for F32, BF16, F16"),
    "others' formats": (with_settings({"quant_method": "fp8"}), f"quantization_config {{'quant_method': 'fp8'}} {OTHERS}"),
    "a format of ours that there is not": (with_settings({"quant_method": "llama-runtime", "format": "int3"}), OTHERS),
    "a format that is no text": (with_settings({"quant_method": "llama-runtime", "format": ["int4"]}), OTHERS),
    "a setting too many": (with_settings({"quant_method": "llama-runtime", "format": "int4", "group": 64}), OTHERS),
    "settings that are no object": (with_settings("int4"), f"quantization_config 'int4' {OTHERS}"),
}


@pytest.fixture(scope="module")
def quantised(checkpoints: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("int4")
    save_model(load_model(checkpoints[False], weights="int4"), directory)
    return directory


@pytest.mark.parametrize("name", SPOILED)
def test_a_malformed_quantised_checkpoint_is_refused_by_name(name: str, quantised: Path, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    spoil, message = SPOILED[name]
    shutil.copytree(quantised, tmp_path / "spoiled")
    spoil(tmp_path / "spoiled")
    monkeypatch.setattr(load, "Llama", None)  # nothing may be allocated
    said = refusal(tmp_path / "spoiled")
    assert message in said
    file = "config.json" if message.endswith(OTHERS) else "model.safetensors"
    assert str(tmp_path / "spoiled" / file) in said


@pytest.mark.parametrize("options, message", [
    ({"weights": "bf16", "device": "cuda"}, "bf16 is a format of the CPU; on cuda give bfloat16 as the dtype instead"),
    ({"weights": "fp8"}, "fp8 weights are for a GPU; on cpu give int8 or int4, or cuda as the device"),
    ({"weights": "int4", "dtype": "float16"},
     "int4 weights compute in bfloat16 or float32; give one of them as the dtype"),
    ({"weights": "bf16", "dtype": "float16"}, "bf16 weights compute in bfloat16 or float32"),
])
def test_what_a_format_cannot_do_is_refused(options: dict[str, str], message: str, checkpoints: dict[bool, Path]) -> None:
    assert message in refusal(checkpoints[False], **options)


@pytest.mark.parametrize("options, message", [
    ({"weights": "int8"}, "is quantised to int4 already; int8 can be made only of the weights as they were trained"),
    ({"dtype": "float16"}, "int4 weights compute in bfloat16 or float32; give one of them as the dtype"),
])
def test_what_is_quantised_stays_so(options: dict[str, str], message: str, quantised: Path) -> None:
    assert message in refusal(quantised, **options)


@FORMAT
@pytest.mark.parametrize("is_stored", [False, True], ids=["quantised while it is read", "stored in blocks"])
def test_row_by_row_the_weights_are_those_of_the_blocks(name: str, is_stored: bool, checkpoints: dict[bool, Path],
                                                        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they are loaded to a GPU, here on the CPU; its own numbers apart, the same logits."""
    source, options = checkpoints[False], {"weights": name}
    if is_stored:
        save_model(load_model(source, **options), tmp_path)
        source, options = tmp_path, {}
    expected = load_model(source, dtype="float32", **options)
    monkeypatch.setattr(linear, "in_blocks", lambda device: False)
    found = load_model(source, dtype="float32", **options)
    assert isinstance(found.blocks[0].attention.qkv, DeviceLinear)
    ids = torch.arange(64)
    for module in ("embed", "head", "blocks.0.attention.qkv", "blocks.0.feed_forward.down"):
        assert found.get_submodule(module).rows(ids).equal(expected.get_submodule(module).rows(ids)), module
    batch = RaggedBatch.whole(IDS)
    torch.testing.assert_close(found(batch), expected(batch), rtol=2e-3, atol=2e-3)


def test_fp8_is_made_while_it_is_read_and_leaves_embedding_and_head_in_int8(checkpoints: dict[bool, Path],
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (linear, load):
        monkeypatch.setattr(module, "in_blocks", lambda device: False)
    model = load_model(checkpoints[False], dtype="float32", weights="fp8")
    inner = model.blocks[1].attention.out
    assert (model.embed.format, model.head.format, inner.format) == (INT8, INT8, FP8)
    assert model.config.quantization == "fp8" and model.num_bytes == model.config.num_weight_bytes("float32", "fp8")
    w = tensors_of(checkpoints[False])["model.layers.1.self_attn.o_proj.weight"].float()
    largest = w.abs().amax(dim=1, keepdim=True)
    assert ((inner.unpack(slice(None)) - w).abs() <= w.abs() / 16 + largest / 448 * 2**-10).all()
    exact = load_model(checkpoints[False], dtype="float32")(RaggedBatch.whole(IDS))
    errors = [(load_model(checkpoints[False], dtype="float32", weights=name)(RaggedBatch.whole(IDS)) - exact).norm()
              for name in ("int8", "fp8", "int4")]
    assert errors == sorted(errors) and errors[-1] < exact.norm()
    model.set_deterministic(True)
    assert inner.deterministic


def test_weights_that_lie_row_by_row_are_not_saved_as_if_they_lay_in_blocks(checkpoints: dict[bool, Path], tmp_path: Path,
                                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "in_blocks", lambda device: False)
    model = load_model(checkpoints[False], weights="int8")
    with pytest.raises(CheckpointError, match="quantised on a GPU .* load the model on the CPU to save it"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
