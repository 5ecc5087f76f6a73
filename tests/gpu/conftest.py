"""What runs on a GPU, from end to end: skipped, and said why, where there is none.

The kernels by themselves are tested in tests/kernels, which run on the GPU too where there is one.
"""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Every test of this folder needs a CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def device() -> str:
    """Where these tests compute, as `Llama.load` is told."""
    return "cuda"
