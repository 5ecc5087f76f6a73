"""Where steps are computed, and what the engine may ask of it.

A CPU has computed what it was told when the call returns. A GPU has only noted it, and computes in the order in which it
was told while the host goes on: so nobody waits for a step before the next one stands in the queue, and a step of a
thousand small kernels, told as one graph, is not slowed by the telling.
"""

from collections.abc import Callable, Sequence as Ordered
from typing import TypeVar

import torch
from torch import Tensor

from llama.model.kernels import gpu

Result = TypeVar("Result")


class Device:
    """A CPU.

    captures: whether `capture` is there. If it is, steps are also enqueued ahead of what the host knows.
    """

    captures = False

    def download(self, tensors: Ordered[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin to copy tensors to the host. What is returned waits for them and gives them, on the CPU."""
        return lambda: list(tensors)


class CudaDevice(Device):
    """A GPU, told through the stream that is current for the calling thread."""

    def __init__(self) -> None:
        # Attention's definition in PyTorch reads as many positions as a table has, and a graph's tables are as wide as the
        # longest context: without the kernels, steps are not captured.
        self.captures = gpu.why_not() is None
        self._pool = torch.cuda.graph_pool_handle()

    def download(self, tensors: Ordered[Tensor]) -> Callable[[], list[Tensor]]:
        """See Device. One copy for all, into pinned memory."""
        shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        order = sorted(range(len(tensors)), key=lambda place: -tensors[place].element_size())  # so that all are aligned
        parts = [tensors[place].reshape(-1).view(torch.uint8) for place in order]
        if not parts:
            return list
        buffer, arrived = self._to_host(torch.cat(parts))

        def wait() -> list[Tensor]:
            arrived.synchronize()
            results: dict[int, Tensor] = {}
            for place, part in zip(order, buffer.split([len(part) for part in parts])):
                shape, dtype = shapes[place]
                results[place] = part.view(dtype).view(shape)
            return [results[place] for place in range(len(shapes))]

        return wait

    def capture(self, run: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """What enqueues all that `run` enqueues, as one graph, and the tensors that it leaves its results in.

        `run` reads and writes the same memory each time and does not wait for the device. It is run once before, for what
        is done only at a first time (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs).
        """
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result

    def _to_host(self, packed: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Where a copy of packed [bytes] will be, and what says that it has arrived."""
        buffer = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
        buffer.copy_(packed, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return buffer, arrived


def device_of(place: torch.device) -> Device:
    """The device that a model's tensors lie on."""
    return CudaDevice() if place.type == "cuda" else Device()
