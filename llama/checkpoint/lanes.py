"""What brings the pieces of a checkpoint to the weights: one lane for each reader, a buffer and the way from it.

A reader fills the buffer, has it stored, and waits until that has happened before anybody fills it again. While one
reader's piece is on its way, the others read: so the system's cache is read, pieces cross to the GPU, and the GPU packs
what is there, all at the same time.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor


class Lane(Protocol):
    """One reader's way.

    piece_bytes: what is read at a time. packed_bytes: the same where what is read is packed. direct: whether what needs
    no change is read into the weights themselves. buffer: [bytes], uint8.
    """

    piece_bytes: ClassVar[int]
    packed_bytes: ClassVar[int]
    direct: ClassVar[bool]
    buffer: Tensor

    def __init__(self, num_bytes: int, device: torch.device):
        """With a buffer of so many bytes, to weights on `device`."""

    def enqueue(self, store: Callable[[Tensor], Any], part: Tensor) -> None:
        """Have `store` called with a part of the buffer; what it asks of the device may happen later."""

    def wait(self) -> None:
        """Until all that has been enqueued is done, and the buffer free. Raises what the device has to say."""


class HostLane:
    """To weights in this machine's memory: what is stored is stored at once."""

    # Small enough to be nothing beside the weights; large enough that neither the system call nor Python counts.
    piece_bytes = 2 << 20
    packed_bytes = 1 << 19  # within the processor's cache
    direct = True

    def __init__(self, num_bytes: int, device: torch.device):
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8)

    def enqueue(self, store: Callable[[Tensor], Any], part: Tensor) -> None:
        """Store it."""
        store(part)

    def wait(self) -> None:
        """Nothing to wait for."""


class CudaLane:
    """To weights on a GPU, over a stream of its own.

    The buffer is pinned: only from memory that stays where it is does the GPU fetch by itself, without the driver's
    copying it first. Pinning takes about as long as writing the memory does, so that there is little of it.
    """

    # A fraction of a millisecond over PCIe, beside which launching the copy and Python do not count; eight are 128 MB.
    piece_bytes = packed_bytes = 16 << 20
    direct = False

    def __init__(self, num_bytes: int, device: torch.device):
        self.buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        self._stream = torch.cuda.Stream(device)
        # The weights' memory may have been another tensor's, whose last kernels still run.
        self._stream.wait_stream(torch.cuda.current_stream(device))

    def enqueue(self, store: Callable[[Tensor], Any], part: Tensor) -> None:
        """Begin to copy, and what follows from it, on this lane's stream."""
        with torch.cuda.stream(self._stream):
            store(part)

    def wait(self) -> None:
        """For the stream; other readers run meanwhile."""
        self._stream.synchronize()
