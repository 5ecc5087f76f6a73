"""A checkpoint's weights as GGUF, llama.cpp's format, so that both are measured on the same numbers.

No vocabulary is written: measurements give ids and take ids. Needs the `bench` extra.
"""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np

from llama.checkpoint.safetensors import StoredTensor, read_stored
from llama.config import LlamaConfig

# GGUF's names of what a layer has, by ours.
_LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NAMES = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
          "lm_head.weight": "output.weight"}


def write_gguf(directory: Path, target: Path) -> None:
    """Write a checkpoint in bfloat16 as GGUF, one tensor in memory at a time; norms become float32, as llama.cpp's
    own converter has them. Raises ValueError for another dtype."""
    import gguf

    config = LlamaConfig.from_directory(directory)
    stored = read_stored(directory)
    other = next((tensor for tensor in stored.values() if tensor.dtype != "BF16"), None)
    if other is not None:
        raise ValueError(f"{other.path}: tensor {other.name!r} is {other.dtype}; only bfloat16 is compared")
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    _describe(writer, config)
    for name, tensor in stored.items():
        raw_dtype = gguf.GGMLQuantizationType.F32 if len(tensor.shape) == 1 else gguf.GGMLQuantizationType.BF16
        num_bytes = tensor.num_bytes * (2 if len(tensor.shape) == 1 else 1)
        writer.add_tensor_info(gguf_name(name), tensor.shape, np.dtype(np.uint16), num_bytes, raw_dtype)
    factors = rope_factors(config)
    writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in stored.values():
        writer.write_tensor_data(_content(tensor, config))
    writer.write_tensor_data(factors)
    writer.close()
    partial.replace(target)


def gguf_name(name: str) -> str:
    """GGUF's name of a tensor, by Hugging Face's."""
    if name in _NAMES:
        return _NAMES[name]
    _, _, layer, inner = name.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[inner.removesuffix('.weight')]}.weight"


def rope_factors(config: LlamaConfig) -> np.ndarray:
    """What each rotary frequency is divided by: [head_dim / 2], float32; ones without scaling."""
    from llama.model.rope import inverse_frequencies

    plain = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    return (plain / inverse_frequencies(config).numpy()).astype(np.float32)


def _describe(writer: Any, config: LlamaConfig) -> None:
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(32)  # mostly bfloat16
    writer.add_tokenizer_model("no_vocab")


def _content(tensor: StoredTensor, config: LlamaConfig) -> np.ndarray:
    """A tensor's values: bfloat16 as uint16, or float32 for a vector."""
    flat = np.fromfile(tensor.path, np.uint16, tensor.num_bytes // 2, offset=tensor.offset)
    if len(tensor.shape) == 1:
        return (flat.astype(np.uint32) << 16).view(np.float32)
    rows = flat.reshape(tensor.shape)
    for name, num_heads in (("q_proj", config.num_heads), ("k_proj", config.num_kv_heads)):
        if name in tensor.name:  # llama.cpp turns neighbouring pairs where Hugging Face turns halves
            rows = rows.reshape(num_heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
    return np.ascontiguousarray(rows)


def quantise(source: Path, target: Path, file_type: str) -> None:
    """llama.cpp's own quantisation of a GGUF file to "Q8_0" or "Q4_0". Raises RuntimeError."""
    import llama_cpp

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{file_type}")
    params.nthread = os.cpu_count() or 1
    partial = target.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(bytes(source), bytes(partial), params):
        raise RuntimeError(f"llama.cpp did not quantise {source} to {file_type}")
    partial.replace(target)


def gguf_files(directory: Path, folder: Path, file_types: list[str]) -> dict[str, Path]:
    """The checkpoint as GGUF in each of BF16, Q8_0, Q4_0, written into `folder` unless it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{directory.resolve().name}-{kind}.gguf" for kind in ("BF16", *file_types)}
    if not paths["BF16"].exists():
        write_gguf(directory, paths["BF16"])
    for kind, path in paths.items():
        if not path.exists():
            quantise(paths["BF16"], path, kind)
    return {kind: paths[kind] for kind in file_types}
