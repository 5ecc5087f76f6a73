"""From the host to the device of the model, without waiting."""

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; a view of the buffer as any dtype must begin at a multiple of that dtype's size


def upload(device: torch.device, *arrays: np.ndarray, into: Tensor | None = None) -> list[Tensor]:
    """The arrays as tensors on the device, in one copy that nothing waits for.

    They lie in one buffer, which is pinned if it is for a GPU: only from such memory does a copy run by itself. PyTorch
    keeps it until the copy is over. into: [bytes], uint8, where they shall lie on the device; by default in new memory.
    """
    if not arrays:
        return []
    starts = [num_bytes(*arrays[:place]) for place in range(len(arrays) + 1)]
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    flat = buffer.numpy()
    for start, array in zip(starts, arrays):
        flat[start:start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = buffer.to(device, non_blocking=True) if into is None else into[:len(buffer)].copy_(buffer, non_blocking=True)
    return [there[start:start + array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
            for start, array in zip(starts, arrays)]


def num_bytes(*arrays: np.ndarray) -> int:
    """What arrays take in one buffer."""
    return sum(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)
