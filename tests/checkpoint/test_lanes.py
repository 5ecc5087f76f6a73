"""Lanes to a device that copies late, as a GPU does: no buffer is filled again before what it held has gone."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama.checkpoint import lanes, load
from llama.checkpoint.lanes import CudaLane, HostLane
from llama.checkpoint.load import load_model
from llama.checkpoint.safetensors import CheckpointError
from llama.model.formats import FORMATS
from tests.checkpoint.drafts import SECOND, Draft, hugging_face
from tests.checkpoint.spoiled import CASES, FIRST_OF_SECOND, Case, shrink_while_it_is_read

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 96, "head_dim": 16}
POISON = 0xFF  # NaN in every float format


class LateLane(HostLane):
    """Stores when it is waited for; or, if nobody waits, when the next piece comes, whatever the buffer holds by then."""

    piece_bytes = packed_bytes = 1000
    direct = False
    made: list["LateLane"] = []

    def __init__(self, num_bytes: int, device: torch.device):
        super().__init__(num_bytes, device)
        self.late: Callable[[], Any] | None = None
        self.made.append(self)

    def enqueue(self, store: Callable[[Tensor], Any], part: Tensor) -> None:
        self.finish()
        self.late = partial(store, part)

    def wait(self) -> None:
        self.finish()
        self.buffer.fill_(POISON)

    def finish(self) -> None:
        """The device comes to its end."""
        late, self.late = self.late, None
        if late is not None:
            late()


class LateStream:
    """As much of `torch.cuda.Stream` as a lane uses; what is copied on it is copied as late as in a LateLane."""

    def __init__(self, device: torch.device):
        self.late: Callable[[], Any] | None = None
        self.source: Tensor | None = None
        self.num_copies = 0
        self.behind: list[str] = []

    def wait_stream(self, other: str) -> None:
        self.behind.append(other)

    def synchronize(self) -> None:
        self.finish()
        self.source.view(-1).view(torch.uint8).fill_(POISON)

    def finish(self) -> None:
        """The device comes to its end."""
        late, self.late = self.late, None
        if late is not None:
            late()


class Copying(TorchDispatchMode):
    """Leaves every copy_ to a stream."""

    def __init__(self, stream: LateStream):
        super().__init__()
        self._stream = stream

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.copy_.default:
            return func(*args, **(kwargs or {}))
        self._stream.finish()
        self._stream.late, self._stream.source = partial(func, *args), args[1]
        self._stream.num_copies += 1
        return args[0]


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[LateLane]:
    """The loader goes over LateLanes, all of which are here."""
    monkeypatch.setattr(LateLane, "made", [])
    monkeypatch.setattr(load, "HostLane", LateLane)
    return LateLane.made


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[LateStream]:
    """The loader goes over CudaLanes, without CUDA: their streams."""
    made: list[LateStream] = []

    def make(device: torch.device) -> LateStream:
        made.append(LateStream(device))
        return made[-1]

    def empty(size: int, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        return torch.empty(size, dtype=dtype)

    cuda = SimpleNamespace(Stream=make, stream=Copying, current_stream=lambda device: "the one that computes")
    monkeypatch.setattr(lanes, "torch", SimpleNamespace(cuda=cuda, empty=empty, uint8=torch.uint8))
    monkeypatch.setattr(CudaLane, "piece_bytes", 1000)
    monkeypatch.setattr(load, "HostLane", CudaLane)
    return made


def expected(directory: Path, **options: Any) -> dict[str, Tensor]:
    """The weights as the CPU's lanes bring them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lanes, "torch", torch)
        patch.setattr(load, "HostLane", HostLane)
        return load_model(directory, **options).state_dict()


def assert_same(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bit by bit."""
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert found[name].equal(tensor), name


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16; some fifty pieces for eight readers."""
    directory = tmp_path_factory.mktemp("checkpoint")
    hugging_face(dtype=torch.bfloat16, **SHAPE).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "float32"}, *({"weights": name} for name in FORMATS)],
                         ids=["as they are", "rounded", *FORMATS])
def test_a_buffer_is_not_filled_again_before_it_was_stored(options: dict[str, str], checkpoint: Path,
                                                           late: list[LateLane]) -> None:
    model = load_model(checkpoint, **options)
    complete = all(lane.late is None for lane in late)
    for lane in late:
        lane.finish()
    assert_same(model.state_dict(), expected(checkpoint, **options))
    assert complete  # when the loader came back


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_lane_to_a_gpu_waits_for_its_stream(dtype: str, checkpoint: Path, streams: list[LateStream]) -> None:
    model = load_model(checkpoint, dtype=dtype)
    complete = all(stream.late is None for stream in streams)
    for stream in streams:
        stream.finish()
    assert_same(model.state_dict(), expected(checkpoint, dtype=dtype))
    assert complete  # when the loader came back


def test_everything_goes_over_streams_that_begin_behind_what_is_computed(checkpoint: Path, streams: list[LateStream]
                                                                         ) -> None:
    load_model(checkpoint)
    num_bytes = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert sum(stream.num_copies for stream in streams) > num_bytes // 2000
    assert all(stream.behind == ["the one that computes"] for stream in streams)


def test_buffers_are_few_and_as_large_as_the_pieces(checkpoint: Path, late: list[LateLane]) -> None:
    load_model(checkpoint)
    assert len(late) == 8
    assert {len(lane.buffer) for lane in late} == {7 * 128}  # seven rows of the bytes that fit


def test_a_file_that_shrinks_is_an_error_and_every_lane_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             late: list[LateLane]) -> None:
    Draft().write(tmp_path)
    shrink_while_it_is_read(tmp_path / SECOND, monkeypatch)
    with pytest.raises(CheckpointError, match=f"{SECOND} became shorter while tensor"):
        load_model(tmp_path)
    assert all(lane.late is None for lane in late)


def test_what_the_device_has_to_say_is_raised(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, late: list[LateLane]
                                              ) -> None:
    def wait(lane: LateLane) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(LateLane, "wait", wait)
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        load_model(checkpoint)
