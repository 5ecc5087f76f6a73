"""Where each published tensor goes: Hugging Face's names and shapes, and the joined weights of `llama.model`.

q, k and v are one matrix here, and gate and up another, their rows one below the other. The names stand in
the order of Hugging Face's files, so that shards that are cut by size are cut as the published ones are.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from llama.checkpoint.safetensors import FLOATS, CheckpointError, StoredTensor, quoted
from llama.config import LlamaConfig

# Rotary frequencies, which exports from before 2023 stored. They follow from the configuration, and the model
# computes them from it, as transformers does.
_OLD_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclass(frozen=True)
class Place:
    """One published tensor's rows in a module of `llama.model.transformer.Llama`.

    module: its name among `named_modules()`. attribute: which of its tensors: "weight", or "blocks" and "scale" of one
    that is stored quantised. The tensor, of `shape`, is its rows from `first_row` on (of blocks, the row of the matrix).
    settings: what in the configuration each length in `shape` comes from. dtype: safetensors' name of the only dtype
    that will do; None for any float.
    """

    module: str
    first_row: int
    shape: tuple[int, ...]
    settings: tuple[str, ...]
    attribute: str = "weight"
    dtype: str | None = None

    @property
    def parameter(self) -> str:
        """The tensor's name in the model."""
        return f"{self.module}.{self.attribute}"


def places(config: LlamaConfig) -> dict[str, Place]:
    """Every tensor that a checkpoint of this configuration holds, by its published name.

    A tied head has none of its own. Of a quantised checkpoint (config.quantization), the matrices that can lie in blocks
    (`llama.model.formats`) are stored as such, [rows / 16, block bytes], with their scales, if they have any, beside
    them.
    """
    return dict(_each_stored(config))


def match(config: LlamaConfig, stored: Mapping[str, StoredTensor]) -> dict[str, Place]:
    """`places`, once the stored tensors are known to be just these. Raises CheckpointError."""
    found: dict[str, Place] = {}
    # One by one, up to the first that is missing: a million layers in the configuration cost nothing.
    for name, place in _each_stored(config):
        if name not in stored:
            raise CheckpointError(f"tensor {quoted(name)} is in none of the files {_some_paths(stored)}; "
                                  f"{_why_expected(config, name)}, so the checkpoint is incomplete or the "
                                  "configuration is not its own")
        _check_shape(stored[name], place)
        found[name] = place
    for name in sorted(stored.keys() - found.keys()):
        # A head that is left over is tied. Some exports write it all the same; transformers ignores it too.
        if name != "lm_head.weight" and not _OLD_BUFFER.fullmatch(name):
            raise CheckpointError(f"{stored[name].path} holds tensor {quoted(name)}, which is no part of a "
                                  f"Llama with num_hidden_layers {config.num_layers} as configured; the "
                                  "configuration is not this checkpoint's own, or this is another kind of "
                                  "model")
    return found


def _each_stored(config: LlamaConfig) -> Iterator[tuple[str, Place]]:
    """Published names and their places, as the checkpoint stores them."""
    for name, place in _each_place(config):
        if config.quantization is None:
            yield name, place
        else:
            yield from _quantised(config, name, place)


def _quantised(config: LlamaConfig, name: str, place: Place) -> Iterator[tuple[str, Place]]:
    from llama.model.formats import BLOCK_ROWS, FORMATS, fits  # brings torch, which the others do without

    # A joined matrix lies in blocks only if all its parts can.
    parts = (config.q_size, config.kv_size) if place.module.endswith(".qkv") else place.shape[:1]
    if len(place.shape) == 1 or not all(fits(rows, place.shape[1]) for rows in parts):
        yield name, place
        return
    rows, columns = place.shape
    fmt = FORMATS["int8" if place.module in ("embed", "head") else config.quantization]
    shape, why = (rows // BLOCK_ROWS, fmt.block_bytes(columns)), tuple(f"blocks of {each}" for each in place.settings)
    yield name, replace(place, shape=shape, settings=why, attribute="blocks", dtype="U8")
    if fmt.has_scale:
        yield f"{name}_scale", replace(place, shape=(rows,), settings=place.settings[:1], attribute="scale", dtype="F32")


def _each_place(config: LlamaConfig) -> Iterator[tuple[str, Place]]:
    """Published names and their places, in the order of Hugging Face's files."""
    vocab, hidden = (config.vocab_size, "vocab_size"), (config.hidden_size, "hidden_size")
    inner = config.intermediate_size, "intermediate_size"
    q = config.q_size, "num_attention_heads * head_dim"
    kv = config.kv_size, "num_key_value_heads * head_dim"
    layer_tensors = (
        ("self_attn.q_proj", "attention.qkv", 0, q, hidden),
        ("self_attn.k_proj", "attention.qkv", config.q_size, kv, hidden),
        ("self_attn.v_proj", "attention.qkv", config.q_size + config.kv_size, kv, hidden),
        ("self_attn.o_proj", "attention.out", 0, hidden, q),
        ("mlp.gate_proj", "feed_forward.gate_up", 0, inner, hidden),
        ("mlp.up_proj", "feed_forward.gate_up", config.intermediate_size, inner, hidden),
        ("mlp.down_proj", "feed_forward.down", 0, hidden, inner),
        ("input_layernorm", "attention_norm", 0, hidden),
        ("post_attention_layernorm", "feed_forward_norm", 0, hidden),
    )
    yield _place("model.embed_tokens", "embed", 0, vocab, hidden)
    for layer in range(config.num_layers):
        for published, module, first_row, *axes in layer_tensors:
            yield _place(f"model.layers.{layer}.{published}", f"blocks.{layer}.{module}", first_row, *axes)
    yield _place("model.norm", "norm", 0, hidden)
    if not config.tie_word_embeddings:
        yield _place("lm_head", "head", 0, vocab, hidden)


def _place(published: str, module: str, first_row: int, *axes: tuple[int, str]) -> tuple[str, Place]:
    """A published name and its place; an axis is its length and the setting that gives it."""
    shape, settings = zip(*axes)
    return f"{published}.weight", Place(module, first_row, shape, settings)


def _check_shape(tensor: StoredTensor, place: Place) -> None:
    """Raises CheckpointError with both shapes and the settings in which they differ, or with both dtypes."""
    is_float = tensor.dtype in FLOATS
    if place.dtype != tensor.dtype and not (place.dtype is None and is_float):
        raise CheckpointError(f"{tensor.path}: tensor {quoted(tensor.name)} has dtype {tensor.dtype}, and the "
                              f"configuration asks for {place.dtype or ', '.join(FLOATS)}; use the configuration that "
                              "belongs to these weights")
    if tensor.shape == place.shape:
        return
    where = f"{tensor.path}: tensor {quoted(tensor.name)} has shape {quoted(list(tensor.shape))}"
    if len(tensor.shape) != len(place.shape):
        raise CheckpointError(f"{where}; a Llama's is {list(place.shape)}")
    wrong = " and ".join(f"{setting} is {expected} there and {quoted(actual)} here"
                         for setting, expected, actual in zip(place.settings, place.shape, tensor.shape)
                         if expected != actual)
    raise CheckpointError(f"{where}, but the configuration asks for {list(place.shape)}: {wrong}; "
                          "use the configuration that belongs to these weights")


def _why_expected(config: LlamaConfig, name: str) -> str:
    """The setting by which a tensor should be there."""
    if name == "lm_head.weight":
        return "tie_word_embeddings is false in the configuration"
    if name.startswith("model.layers."):
        return f"num_hidden_layers is {config.num_layers} in the configuration"
    return "every Llama has it"


def _some_paths(stored: Mapping[str, StoredTensor]) -> str:
    """The files that were read, at most three by name."""
    paths = sorted({str(tensor.path) for tensor in stored.values()})
    return ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
