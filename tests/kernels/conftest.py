"""Where the tests of Triton's kernels run: on the GPU if there is one, otherwise in Triton's interpreter."""

import pytest
import torch

from llama.model.kernels import gpu


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tensors of a test lie."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def triton_everywhere(monkeypatch):
    """`gpu.serves` is true on the CPU too."""
    pytest.importorskip("triton")
    monkeypatch.setenv("LLAMA_KERNELS", "triton")
    gpu._everywhere.cache_clear()
    yield
    gpu._everywhere.cache_clear()
