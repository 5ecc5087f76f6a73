"""Small checkpoints: written byte by byte, so that a test can spoil any of them, and by transformers."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 16, "hidden_size": 8,
    "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "rope_theta": 10000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "hidden_act": "silu",
}


def layer(number: int, part: str) -> str:
    """A layer's tensor, such as self_attn.q_proj, by its published name."""
    return f"model.layers.{number}.{part}.weight"


def published_shapes() -> dict[str, list[int]]:
    """The tensors that belong to CONFIG, by the published names: written out, not taken from the code."""
    shapes = {EMBED: [16, 8]}
    for number in range(2):
        shapes |= {layer(number, "self_attn.q_proj"): [8, 8], layer(number, "self_attn.k_proj"): [4, 8],
                   layer(number, "self_attn.v_proj"): [4, 8], layer(number, "self_attn.o_proj"): [8, 8],
                   layer(number, "mlp.gate_proj"): [12, 8], layer(number, "mlp.up_proj"): [12, 8],
                   layer(number, "mlp.down_proj"): [8, 12], layer(number, "input_layernorm"): [8],
                   layer(number, "post_attention_layernorm"): [8]}
    return shapes | {NORM: [8], HEAD: [16, 8]}


class Draft:
    """Two shards of a checkpoint before they are written; layer 1 straddles them, and so does its joined qkv.

    headers: for each file, name -> {dtype, shape, data_offsets}. data: each file's bytes after the header.
    """

    def __init__(self) -> None:
        self.config: dict[str, Any] = dict(CONFIG)
        self.headers: dict[str, dict[str, Any]] = {FIRST: {"__metadata__": {"format": "pt"}}, SECOND: {}}
        self.data = {FIRST: b"", SECOND: b""}
        for number, (name, shape) in enumerate(published_shapes().items()):
            self.add(FIRST if number < 12 else SECOND, name, shape)
        self.weight_map: Any = {name: shard for shard, header in self.headers.items()
                                for name in header if name != "__metadata__"}

    def add(self, shard: str, name: str, shape: list[int], dtype: str = "BF16",
            element_bytes: int = 2) -> None:
        """One more tensor at the end of a file, of random bytes that are finite numbers; not in the index."""
        size = element_bytes
        for length in shape:
            size *= length
        begin = len(self.data[shard])
        self.headers[shard][name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}
        noise = torch.randint(0, 100, (size,), generator=torch.Generator().manual_seed(begin),
                              dtype=torch.uint8)
        self.data[shard] += bytes(noise.tolist())

    def find(self, name: str) -> dict[str, Any]:
        """The header's entry of a tensor."""
        return next(header[name] for header in self.headers.values() if name in header)

    def remove(self, name: str) -> None:
        """Take out a tensor, with its bytes and its place in the index."""
        shard = next(shard for shard, header in self.headers.items() if name in header)
        begin, end = self.headers[shard].pop(name)["data_offsets"]
        self.data[shard] = self.data[shard][:begin] + self.data[shard][end:]
        for key, entry in self.headers[shard].items():
            if key != "__metadata__" and entry["data_offsets"][0] >= end:
                entry["data_offsets"] = [offset - (end - begin) for offset in entry["data_offsets"]]
        del self.weight_map[name]

    def write(self, directory: Path) -> None:
        """config.json, the shards and the index."""
        (directory / "config.json").write_text(json.dumps(self.config))
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self.weight_map}))
        for shard, header in self.headers.items():
            write_file(directory / shard, json.dumps(header).encode(), self.data[shard])


def write_file(path: Path, header: bytes, data: bytes = b"", header_bytes: int | None = None) -> None:
    """A safetensors file of any header, with a wrong length in front of it if one is given."""
    length = len(header) if header_bytes is None else header_bytes
    path.write_bytes(length.to_bytes(8, "little") + header + data)


def read_file(path: Path) -> tuple[bytes, bytes]:
    """A safetensors file's header and what follows it."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return content[8:end], content[end:]


def hugging_face(tied: bool = False, dtype: torch.dtype = torch.bfloat16, **changes: Any,
                 ) -> transformers.LlamaForCausalLM:
    """A random model of transformers with all that matters: unequal heads, 3.1's scaling, norms unlike 1."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    settings = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3,
                "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope,
                "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 131072,
                "tie_word_embeddings": tied, "dtype": dtype}
    config = transformers.LlamaConfig(**settings | changes)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().requires_grad_(False).to(dtype)
    for weight in model.parameters():
        weight.normal_(1.0 if weight.dim() == 1 else 0.0, 0.2)
    return model
