"""A random model that this project and transformers read from the same files."""

import pytest
import transformers

from llama import Llama
from tools.make_checkpoint import main as make_checkpoint


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory):
    """Tiny, in float32, with the demo's tokenizer."""
    directory = tmp_path_factory.mktemp("random")
    make_checkpoint([str(directory), "--shape", "tiny", "--vocab-size", "1280", "--dtype", "float32",
                     "--tokenizer", "llama/demo"])
    return directory


@pytest.fixture(scope="session")
def llm(random_checkpoint):
    """Ours. Its steps have 60 tokens, so that most texts here take several."""
    return Llama.load(random_checkpoint, limits={"step_tokens": 60}, kv_cache_bytes=1 << 20)


@pytest.fixture(scope="session")
def theirs(random_checkpoint):
    """transformers'."""
    model = transformers.LlamaForCausalLM.from_pretrained(random_checkpoint, dtype="auto").eval()
    return model.requires_grad_(False)
