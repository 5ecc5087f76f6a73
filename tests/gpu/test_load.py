"""Loading to a GPU: the same bits as on the CPU, and no memory held that the weights do not need."""

from pathlib import Path

import pytest
import torch

from llama.checkpoint.lanes import CudaLane
from llama.checkpoint.load import load_model
from tests.checkpoint.drafts import hugging_face


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In float32, some megabytes, so that there is much to read and to round."""
    directory = tmp_path_factory.mktemp("checkpoint")
    hugging_face(dtype=torch.float32, hidden_size=512, intermediate_size=1024, vocab_size=4096, head_dim=128
                 ).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("piece_bytes", [1 << 14, CudaLane.piece_bytes], ids=["many pieces", "pieces as they are"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_the_same_bits_as_on_the_cpu(dtype: str, piece_bytes: int, checkpoint: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    expected = dict(load_model(checkpoint, dtype=dtype).named_parameters())
    monkeypatch.setattr(CudaLane, "piece_bytes", piece_bytes)
    for turn in range(3):  # the memory of the last turn's weights, which are poison, becomes that of this turn's
        model = load_model(checkpoint, dtype=dtype, device="cuda")
        for name, parameter in model.named_parameters():
            assert parameter.is_cuda and parameter.cpu().equal(expected[name]), (name, turn)
            parameter.fill_(float("nan"))
        del model, parameter


def test_frequencies_are_the_same_bits_as_on_the_cpu(checkpoint: Path) -> None:
    assert load_model(checkpoint, device="cuda").frequencies.cpu().equal(load_model(checkpoint).frequencies)


def test_buffers_are_pinned_and_128_megabytes_at_most() -> None:
    assert 8 * CudaLane.piece_bytes <= 128 << 20 and CudaLane.packed_bytes <= CudaLane.piece_bytes
    assert CudaLane(1000, torch.device("cuda", torch.cuda.current_device())).buffer.is_pinned()


def test_nothing_is_held_on_the_device_but_the_weights(checkpoint: Path) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    model = load_model(checkpoint, dtype="bfloat16", device="cuda")  # rounded: that takes memory on the way
    assert torch.cuda.memory_reserved() - before <= model.num_bytes + (64 << 20)  # torch takes 20 MB at a time
