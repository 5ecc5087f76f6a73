"""A model that can be foretold: after each byte comes its successor in the alphabet, whatever precedes."""

import base64
import shutil
from pathlib import Path

import torch

from llama.checkpoint.save import save_model
from llama.config import LlamaConfig
from llama.model.transformer import Llama

BOS, EOT = 256, 265
# What it says after a line end, and so to every conversation.
ALPHABET = "abcdefghijklmnopqrstuvwxyzé"
_CHAIN = [ord("\n"), *ALPHABET.encode()]


def make_checkpoint(directory: Path, *, endless: bool = False, context: int = 4096,
                    template: bool = True) -> Path:
    """Write it. endless: the alphabet begins again after its end, where otherwise the turn ends."""
    config = LlamaConfig(vocab_size=512, hidden_size=512, intermediate_size=8, num_layers=1, num_heads=1,
                         num_kv_heads=1, head_dim=8, max_position_embeddings=context, rope_theta=1e4,
                         rope_scaling=None, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=BOS,
                         eos_token_ids=(EOT,), dtype="float32")
    model = Llama(config, torch.float32, "cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0 if parameter.dim() == 1 else 0.0)  # attention and feed-forward add nothing
        model.embed.weight.copy_(torch.eye(512))
        for token, successor in zip(_CHAIN, [*_CHAIN[1:], _CHAIN[1] if endless else EOT]):
            model.head.weight[successor, token] = 1.0
    save_model(model, directory)
    lines = (base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
    (directory / "tokenizer.model").write_bytes(b"".join(lines))
    if template:
        demo = Path(__file__).parents[2] / "llama" / "demo"
        shutil.copy(demo / "chat_template.jinja", directory)
    return directory
