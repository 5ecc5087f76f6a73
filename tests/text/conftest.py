"""The two tokenizers that the tests of this folder compare, each made once."""

import pytest
from llama_models.llama3.api.tokenizer import Tokenizer as MetaTokenizer

from llama.text.chat import ChatTemplate
from llama.text.tokenizer import Tokenizer
from tests.oracles import meta_tokenizer_file, official_template
from tests.text.samples import small_tokenizer


@pytest.fixture(scope="session")
def meta() -> MetaTokenizer:
    """Meta's own tokenizer, on tiktoken."""
    return MetaTokenizer(str(meta_tokenizer_file()))


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Ours, from Meta's tokenizer.model."""
    return Tokenizer.from_tiktoken_file(meta_tokenizer_file())


@pytest.fixture(scope="session")
def template() -> ChatTemplate:
    """The official chat template of Llama 3.1."""
    return ChatTemplate(official_template())


@pytest.fixture(scope="session")
def small() -> Tokenizer:
    """A vocabulary of some 270 ids, whose special tokens come first."""
    return Tokenizer(small_tokenizer())
