"""Heavy tails and outlier channels: there, where they should be, and the same every time."""

import math
from pathlib import Path

import pytest
import torch

from llama.checkpoint.load import load_model
from llama.model.ragged import RaggedBatch
from tests.tools.test_make_checkpoint import files, make, read, rms
from tools.heavy_tails import channel_sizes, element_sizes, heavy_block

N = 200_000


def test_weights_follow_students_t_with_the_same_standard_deviation():
    """Its percentiles stand in any table: those of 6 degrees of freedom."""
    block = heavy_block(N, torch.Generator().manual_seed(1))
    for share, value in ((0.5, 0.0), (0.75, 0.7176), (0.95, 1.9432), (0.975, 2.4469), (0.999, 5.2076)):
        assert (block > value * math.sqrt(4 / 6)).double().mean() == pytest.approx(1 - share, rel=0.08)
        assert (block < -value * math.sqrt(4 / 6)).double().mean() == pytest.approx(1 - share, rel=0.08)
    assert block.std() == pytest.approx(1, abs=0.02)
    assert block.abs().max() > 8


def test_few_channels_are_outliers_the_same_in_any_layer():
    sizes = channel_sizes(2048, "residual", 0)
    outliers = sizes[sizes > 1]
    assert len(outliers) == 10 and outliers.min() >= 8 and outliers.max() <= 64
    assert sizes.equal(channel_sizes(2048, "residual", 0)) and not sizes.equal(channel_sizes(2048, "residual", 1))
    assert not sizes.equal(channel_sizes(2048, "feed-forward", 0))
    assert (channel_sizes(20, "residual", 0) > 1).sum() == 1


def test_each_tensor_has_them_where_it_meets_the_stream(tmp_path: Path):
    tensors = read(make(tmp_path, "--dtype", "float32", "--heavy-tails"))
    stream, inner = channel_sizes(64, "residual", 0).argmax(), channel_sizes(192, "feed-forward", 0).argmax()
    layer = "model.layers.1."
    assert tensors["model.embed_tokens.weight"].std(dim=0).argmax() == stream
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert tensors[f"{layer}{name}.weight"].std(dim=1).argmax() == stream
    assert tensors[f"{layer}mlp.up_proj.weight"].std(dim=1).argmax() == inner
    assert tensors[f"{layer}mlp.down_proj.weight"].std(dim=0).argmin() == inner
    for name in (f"{layer}input_layernorm.weight", f"{layer}post_attention_layernorm.weight", "model.norm.weight"):
        assert tensors[name].argmin() == stream and tensors[name].min() < 0.5
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj"):
        spread = tensors[f"{layer}{name}.weight"].std(dim=1)
        assert spread.max() < 4 * spread.min()  # an outlier is 8 times and more


def test_blocks_of_elements_are_cut_from_the_whole():
    name, shape = "model.layers.0.mlp.down_proj.weight", (64, 192)
    whole = element_sizes(name, shape, 0, 64 * 192, 3)
    parts = [element_sizes(name, shape, first, min(1000, 64 * 192 - first), 3) for first in range(0, 64 * 192, 1000)]
    assert torch.cat(parts).equal(whole)
    outer = channel_sizes(64, "residual", 3)[:, None] / channel_sizes(192, "feed-forward", 3)
    assert whole.view(shape).equal(outer)


def test_the_stream_has_outliers_and_the_logits_do_not(tmp_path: Path):
    """And the same flags give the same files, which differ from those without."""
    arguments = ["--dtype", "float32", "--layers", "8", "--heavy-tails"]
    model = load_model(make(tmp_path / "one", *arguments))
    hidden = model.hidden(RaggedBatch.whole(torch.randint(0, 512, (64,), generator=torch.Generator().manual_seed(1))))
    sizes = hidden.square().mean(dim=0).sqrt()
    assert sizes.argmax() == channel_sizes(64, "residual", 0).argmax()
    assert sizes.max() > 5 * sizes.median()
    assert 0.1 < rms(model.logits(hidden)) < 3
    assert files(make(tmp_path / "again", *arguments)) == files(tmp_path / "one")
    assert read(make(tmp_path / "plain", *arguments[:-1])).keys() == read(tmp_path / "one").keys()
    assert files(tmp_path / "plain")["model.safetensors"] != files(tmp_path / "one")["model.safetensors"]
