"""Where the tests of Triton's kernels run: on the GPU if there is one, otherwise in Triton's interpreter."""

import os

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
    if os.environ.get("TRITON_INTERPRET"):
        _multiply_bfloat16(monkeypatch)
    yield
    gpu._everywhere.cache_clear()


def _multiply_bfloat16(monkeypatch):
    """Triton's interpreter keeps bfloat16 as the 16 bits that it is, and its `dot` multiplies those: give it float32."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        a, b = (self.create_fp_ext(one, tl.float32) if one.dtype.scalar == tl.bfloat16 else one for one in (a, b))
        return dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
