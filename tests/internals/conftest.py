"""The demo model in float32, once for all that look inside it."""

import pytest

from llama.runtime import Llama


@pytest.fixture(scope="session")
def llm() -> Llama:
    """The embedded checkpoint."""
    return Llama.load(dtype="float32", progress=False)
