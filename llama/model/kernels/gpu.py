"""Whether Triton's kernels compute what is done to a tensor: those on a CUDA device, where Triton is installed.

LLAMA_KERNELS=torch in the environment asks for none: the definitions in PyTorch then do the work there too.
LLAMA_KERNELS=triton asks for them on the CPU as well, where only Triton's interpreter can run them (TRITON_INTERPRET=1):
slow, but the same kernels, so that they can be tested without a GPU.
"""

import functools
import importlib.util
import os

import torch
from torch import Tensor

# Up to so many rows of x, W is what a product has to read, and a kernel reads it once. With more, a library's tiles are as
# good, and it multiplies at its best rate.
FEW_ROWS = 16
# Sizes of a head that the kernels for attention and its cache take.
HEAD_DIMS = (32, 64, 128, 256)


def serves(x: Tensor) -> bool:
    """Whether the kernels take this tensor. They know no gradients."""
    return (x.is_cuda or _everywhere()) and why_not() is None and not (x.requires_grad and torch.is_grad_enabled())


@functools.cache
def why_not() -> str | None:
    """Why there are no kernels for CUDA devices, and what would change that; None if there are."""
    if os.environ.get("LLAMA_KERNELS") == "torch":
        return "LLAMA_KERNELS=torch in the environment asks for none"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with PyTorch's builds for CUDA"
    return None


@functools.cache
def _everywhere() -> bool:
    return os.environ.get("LLAMA_KERNELS") == "triton"
