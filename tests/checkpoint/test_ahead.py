"""Reading ahead: what Linux is asked for, and when it is not."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama.checkpoint import ahead


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int, int]]:
    """File name, offset, length and advice of every call, made in the calling thread."""
    calls: list[tuple[str, int, int, int]] = []

    def advise(descriptor: int, *rest: int) -> None:
        calls.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).name, *rest))

    class Thread:
        def __init__(self, target: Callable[..., None], args: tuple[Any, ...], daemon: bool):
            self.start = partial(target, *args)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(ahead, "threading", SimpleNamespace(Thread=Thread))
    return calls


def write(directory: Path) -> None:
    """Two shards and something else."""
    for name in ("b.safetensors", "a.safetensors", "config.json"):
        (directory / name).write_bytes(bytes(600))


def test_all_weights_are_asked_for_in_their_order(tmp_path: Path, asked: list) -> None:
    write(tmp_path)
    ahead.read_ahead(tmp_path)
    assert asked == [(name, 0, 0, os.POSIX_FADV_WILLNEED) for name in ("a.safetensors", "b.safetensors")]


@pytest.mark.parametrize(("free", "count"), [(3600, 2), (3599, 0)])
def test_what_would_push_itself_out_of_the_cache_is_left_alone(tmp_path: Path, asked: list, monkeypatch: pytest.MonkeyPatch,
                                                               free: int, count: int) -> None:
    write(tmp_path)
    monkeypatch.setattr(ahead, "available_memory", lambda: free)
    ahead.read_ahead(tmp_path)
    assert len(asked) == count


def test_what_cannot_be_read_is_no_error_here(tmp_path: Path, asked: list) -> None:
    write(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    (tmp_path / "a.safetensors").mkdir()
    ahead.read_ahead(tmp_path)
    assert asked == []
