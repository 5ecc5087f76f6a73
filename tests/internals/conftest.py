"""The models that are looked into: the demo in float32, and a tiny random one beside transformers' of the same weights."""

import pytest

from llama.runtime import Llama
from tests.engine.running import TINY
from tests.model.pairs import hugging_face, ours


@pytest.fixture(scope="module")
def theirs():
    """transformers' model."""
    return hugging_face(TINY["8:2"])


@pytest.fixture(scope="module")
def model(theirs):
    """Ours."""
    return ours(theirs)


@pytest.fixture(scope="session")
def llm() -> Llama:
    """The embedded checkpoint."""
    return Llama.load(dtype="float32", progress=False)
