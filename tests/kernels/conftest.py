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
def triton_everywhere(monkeypatch, device):
    """`gpu.serves` is true on the CPU too: nothing here may compare a definition with itself."""
    pytest.importorskip("triton")
    monkeypatch.setenv("LLAMA_KERNELS", "triton")
    gpu._everywhere.cache_clear()
    if os.environ.get("TRITON_INTERPRET"):
        _multiply_bfloat16(monkeypatch)
        _round_to_fp8(monkeypatch)
    assert gpu.serves(torch.empty(1, device=device))
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


def _round_to_fp8(monkeypatch):
    """Triton's interpreter does not round to the nearest of float8_e4m3fn, as a GPU and PyTorch do: let PyTorch."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def to_fp8(convert):
        def converted(self, value, dtype, *rest):
            if dtype.scalar != tl.float8e4nv or value.dtype.scalar != tl.float32:
                return convert(self, value, dtype, *rest)
            rounded = torch.from_numpy(value.data.copy()).to(torch.float8_e4m3fn)
            return TensorHandle(rounded.view(torch.uint8).numpy(), tl.float8e4nv)
        return converted

    for name in ("create_fp_trunc", "create_fp_to_fp"):
        monkeypatch.setattr(InterpreterBuilder, name, to_fp8(getattr(InterpreterBuilder, name)))
