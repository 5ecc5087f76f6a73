"""From the host to the device of the model, without waiting."""

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 16  # bytes; a view of the buffer as any dtype must begin at a multiple of that dtype's size


def upload(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """The arrays as tensors on the device, in one copy that nothing waits for.

    They lie in one buffer, which is pinned if it is for a GPU: only from such memory does a copy run by itself. PyTorch
    keeps it until the copy is over.
    """
    if not arrays:
        return []
    starts = np.cumsum([0, *(-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays)]).tolist()
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    flat = buffer.numpy()
    for start, array in zip(starts, arrays):
        flat[start:start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = buffer.to(device, non_blocking=True)
    return [there[start:start + array.nbytes].view(getattr(torch, array.dtype.name)).view(array.shape)
            for start, array in zip(starts, arrays)]
