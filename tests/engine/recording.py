"""A device on the CPU that does honestly what a GPU does with graphs and copies, so that their use is tested without one.

A capture records every operation with the tensors that it was given, and leaves nothing computed; a replay carries them out
again on the same memory, and no Python of the model runs. What would wait for a GPU while capturing raises. A copy to the
host holds rubbish until it is waited for.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama.engine.device import CudaDevice
from llama.engine.engine import Engine

RUBBISH = 0xEE
_WAITING_OPERATORS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2",
                      "unique_dim", "unique_consecutive", "bincount"}
_WAITING_METHODS = {"tolist", "numpy", "item", "cpu", "__bool__", "__int__", "__float__", "__index__"}


class WaitError(AssertionError):
    """Something that waits for the device where nothing may, or that needs the host's memory in a capture."""


class Recording(TorchDispatchMode):
    """Records operators, and raises WaitError for what a stream that is being captured does not take."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, tuple, dict, list[tuple[int, Tensor]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        _refuse_waiting(func, args)
        if _name(func) == "lift_fresh":
            raise WaitError("a tensor comes from the host in a capture")
        result = func(*args, **kwargs)
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        new = [(place, leaf) for place, leaf in enumerate(tree_leaves(result))
               if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known]
        self._operations.append((func, args, kwargs, new))
        return result

    def forget_results(self) -> None:
        """As a GPU, which computes nothing while it captures."""
        for *_, new in self._operations:
            for _, tensor in new:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    def replay(self) -> None:
        """All of it again, on the same memory."""
        for func, args, kwargs, new in self._operations:
            results = tree_leaves(func(*args, **kwargs))
            for place, tensor in new:
                tensor.copy_(results[place])


class NoWaiting(TorchFunctionMode):
    """Raises WaitError where a tensor of the device becomes a number or an array of the host."""

    def __init__(self) -> None:
        super().__init__()
        self._host: list[Tensor] = []  # buffers to copy from, which are the host's

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _WAITING_METHODS and not any(args[0] is buffer for buffer in self._host):
            raise WaitError(f"{name} waits for the device")
        result = func(*args, **kwargs)
        if name == "empty" and "pin_memory" in kwargs:
            self._host.append(result)
        return result


class NoWaitingOperators(TorchDispatchMode):
    """The same for operators."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        _refuse_waiting(func, args)
        return func(*args, **(kwargs or {}))


class RecordingDevice(CudaDevice):
    """num_graphs: captured so far. num_replays: of all of them."""

    def __init__(self) -> None:
        self.captures = True
        self.num_graphs = self.num_replays = 0

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """See Device."""
        run()
        recording = Recording()
        with NoWaiting(), recording:
            result = run()
        recording.forget_results()
        self.num_graphs += 1

        def replay() -> None:
            self.num_replays += 1
            recording.replay()

        return replay, result

    def _to_host(self, packed: Tensor) -> tuple[Tensor, Any]:
        buffer = torch.full_like(packed, RUBBISH)
        return buffer, _Arrival(buffer, packed.clone())


def watch(engine: Engine, counts: Counter[str]) -> Engine:
    """The engine; it counts its steps ahead, and lets none of them wait for the device, or fail unseen."""
    launch = engine._run

    def watched(plan):
        if plan.follows is None:
            return launch(plan)
        counts["ahead"] += 1
        try:
            with NoWaiting(), NoWaitingOperators():
                return launch(plan)
        except (AssertionError, IndexError, ValueError, TypeError) as error:
            raise SystemExit(f"a step ahead: {error}") from error

    engine._run = watched
    return engine


class _Arrival:
    def __init__(self, buffer: Tensor, content: Tensor):
        self._buffer, self._content = buffer, content

    def synchronize(self) -> None:
        """Let the copy arrive."""
        self._buffer.copy_(self._content)


def _refuse_waiting(func: Any, args: tuple) -> None:
    indices = tree_leaves(args[1]) if _name(func) in ("index", "index_put_", "index_put") else ()
    by_mask = any(isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices)
    if _name(func) in _WAITING_OPERATORS or by_mask:
        raise WaitError(f"{func} waits for the device")


def _name(func: Any) -> str:
    return func.overloadpacket.__name__.split("::")[-1]
