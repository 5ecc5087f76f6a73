"""The numbers that make a Llama: read strictly, so that what this code does not compute is refused by name.

Two spellings of the same thing are understood: `config.json` (Hugging Face, old and new exports) and
`params.json` (Meta). This module imports neither torch nor anything of the project but `llama.strict_json`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama.strict_json import ConfigError, read_flag, read_json_object, read_number, read_token_ids

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# What keys and values may be rounded to: 8 bits, and a float32 for each head of a token.
QUANTISED_KV = ("int8", "fp8")
# Bits of one weight in the quantised formats (`llama.model.formats`), and those that each row has beside its weights.
QUANTISED_BITS = {"int8": 8, "int4": 5, "fp8": 8}
_ROW_BITS = {"int8": 32, "int4": 0, "fp8": 32}
# Those that a checkpoint may be stored in; fp8 is made while it is loaded to a GPU.
STORED_FORMATS = ("int8", "int4")
# What `quantization_config` in a config.json of this project's own making says.
_QUANT_METHOD = "llama-runtime"


@dataclass(frozen=True)
class RopeScaling:
    """The Llama 3.1 scaling of the rotary frequencies: see `llama.model.rope.inverse_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of one model and the token ids it begins and ends with.

    dtype: of the checkpoint's tensors; quantization: the format ("int8", "int4") that its matrices were rounded to, if any.
    Sizes are counts of elements, `head_dim` that of one attention head. Query head h reads the keys and values
    of head h // group_size (grouped-query attention, arXiv:2305.13245).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "bfloat16"
    quantization: str | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads",
                     "num_kv_heads", "head_dim", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key/value heads "
                              "evenly; num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embeddings need an even number")
        if self.rope_theta <= 1:
            raise ConfigError(f"rope_theta is {self.rope_theta}; it must be above 1")
        if self.rms_norm_eps <= 0:
            raise ConfigError(f"rms_norm_eps is {self.rms_norm_eps}; it must be above 0")
        if self.bos_token_id is not None and self.bos_token_id < 0:
            raise ConfigError(f"bos_token_id is {self.bos_token_id}; it must be at least 0")

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    @property
    def q_size(self) -> int:
        """Width of all query heads side by side."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads side by side, and of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Distinct weights: a tied head counts once."""
        attention = self.hidden_size * (2 * self.q_size + 2 * self.kv_size)
        feed_forward = 3 * self.hidden_size * self.intermediate_size
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        norms = self.hidden_size * (2 * self.num_layers + 1)
        return self.num_layers * (attention + feed_forward) + embeddings + norms

    def num_weight_bytes(self, dtype: str | None = None, quantize: str | None = None) -> int:
        """Bytes of all weights in `dtype` (by default the checkpoint's own), or quantised: then embedding and head have
        8 bits, and norms stay as they are. Matrices whose shape does not allow it would stay so too; no published
        model has one."""
        if quantize is None:
            return self.num_parameters * DTYPE_BYTES[dtype or self.dtype]
        norms = self.hidden_size * (2 * self.num_layers + 1)
        end_rows = self.vocab_size * (1 if self.tie_word_embeddings else 2)
        layers = self.num_parameters - norms - end_rows * self.hidden_size
        rows = self.num_layers * (self.q_size + 2 * self.kv_size + 2 * self.intermediate_size + 2 * self.hidden_size)
        bits = (layers * QUANTISED_BITS[quantize] + rows * _ROW_BITS[quantize]
                + end_rows * (self.hidden_size * QUANTISED_BITS["int8"] + _ROW_BITS["int8"]))
        return bits // 8 + norms * DTYPE_BYTES[dtype or self.dtype]

    def context_length(self, wanted: int | None = None) -> int:
        """Positions of prompt and reply together; None: all that the model was made for. Raises ConfigError."""
        most = self.max_position_embeddings
        if wanted is not None and not 1 <= wanted <= most:
            raise ConfigError(f"a context of {wanted} tokens is not what this model was made for; give 1 to {most}")
        return most if wanted is None else wanted

    def kv_bytes_per_token(self, dtype: str | None = None) -> int:
        """Bytes that one position takes in the KV cache, all layers together, in a dtype or one of QUANTISED_KV."""
        head_bytes = self.head_dim + 4 if dtype in QUANTISED_KV else self.head_dim * DTYPE_BYTES[dtype or self.dtype]
        return 2 * self.num_layers * self.num_kv_heads * head_bytes

    @classmethod
    def from_directory(cls, directory: str | Path) -> "LlamaConfig":
        """Read `config.json`, or Meta's `params.json` where there is no other. Raises ConfigError."""
        directory = Path(directory)
        for name, read in (("config.json", cls.from_dict), ("params.json", cls.from_params)):
            path = directory / name
            if path.is_file():
                raw = read_json_object(path)
                try:
                    return read(raw)
                except ConfigError as error:
                    raise ConfigError(f"{path}: {error}") from None
        raise ConfigError(f"{directory} holds neither config.json nor params.json; "
                          "name the directory of a Llama checkpoint")

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> "LlamaConfig":
        """Read the object in a `config.json`. Unsupported settings raise ConfigError with their name."""
        _refuse_unsupported(raw)
        hidden_size = read_number(raw, "hidden_size", int)
        num_heads = read_number(raw, "num_attention_heads", int)
        if num_heads < 1:
            raise ConfigError(f"num_attention_heads is {num_heads}; it must be at least 1")
        rope_theta, rope_scaling = _read_rope(raw)
        head_dim = read_number(raw, "head_dim", int, None)
        if head_dim is None:
            if hidden_size % num_heads:
                raise ConfigError(f"hidden_size {hidden_size} is not a multiple of num_attention_heads "
                                  f"{num_heads}, and there is no head_dim to say otherwise")
            head_dim = hidden_size // num_heads
        return cls(
            vocab_size=read_number(raw, "vocab_size", int),
            hidden_size=hidden_size,
            intermediate_size=read_number(raw, "intermediate_size", int),
            num_layers=read_number(raw, "num_hidden_layers", int),
            num_heads=num_heads,
            num_kv_heads=read_number(raw, "num_key_value_heads", int, num_heads),
            head_dim=head_dim,
            max_position_embeddings=read_number(raw, "max_position_embeddings", int),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rms_norm_eps=read_number(raw, "rms_norm_eps", float),
            tie_word_embeddings=read_flag(raw, "tie_word_embeddings"),
            bos_token_id=read_number(raw, "bos_token_id", int, None),
            eos_token_ids=read_token_ids(raw, "eos_token_id"),
            dtype=_read_dtype(raw),
            quantization=_read_quantization(raw),
        )

    @classmethod
    def from_params(cls, raw: dict[str, Any]) -> "LlamaConfig":
        """Read Meta's `params.json`. Its `use_scaled_rope` stands for the 3.1 scaling by 8 (32 in 3.2)."""
        known = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "ffn_dim_multiplier", "multiple_of",
                 "norm_eps", "rope_theta", "use_scaled_rope", "model_parallel_size", "max_seq_len"}
        for name in sorted(raw.keys() - known):
            raise ConfigError(f"{name!r} is not a setting that this code knows")
        dim, num_heads = read_number(raw, "dim", int), read_number(raw, "n_heads", int)
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"dim {dim} is not a multiple of n_heads {num_heads}")
        multiple_of = read_number(raw, "multiple_of", int, 256)
        if multiple_of < 1:
            raise ConfigError(f"multiple_of is {multiple_of}; it must be at least 1")
        multiplier = read_number(raw, "ffn_dim_multiplier", float, 1.0)
        if not 0 < multiplier <= 100:
            raise ConfigError(f"ffn_dim_multiplier is {multiplier}; it must be above 0 and at most 100")
        inner = int(multiplier * int(8 * dim / 3))
        scaled = read_flag(raw, "use_scaled_rope")
        # Meta ties the head in 3.2 1B and 3B only, and scales those by 32; params.json says neither.
        small = scaled and dim in (2048, 3072)
        return cls(
            vocab_size=read_number(raw, "vocab_size", int),
            hidden_size=dim,
            intermediate_size=multiple_of * math.ceil(inner / multiple_of),
            num_layers=read_number(raw, "n_layers", int),
            num_heads=num_heads,
            num_kv_heads=read_number(raw, "n_kv_heads", int, num_heads),
            head_dim=dim // num_heads,
            max_position_embeddings=131072 if scaled else 8192,
            rope_theta=read_number(raw, "rope_theta", float),
            rope_scaling=RopeScaling(32.0 if small else 8.0, 1.0, 4.0, 8192) if scaled else None,
            rms_norm_eps=read_number(raw, "norm_eps", float),
            tie_word_embeddings=small,
            bos_token_id=128000,
            eos_token_ids=(128001, 128008, 128009),
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as a `config.json` object that `from_dict` and Hugging Face read back."""
        scaling = self.rope_scaling and {
            "factor": self.rope_scaling.factor,
            "low_freq_factor": self.rope_scaling.low_freq_factor,
            "high_freq_factor": self.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": self.rope_scaling.original_max_position_embeddings,
            "rope_type": "llama3",
        }
        return {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": list(self.eos_token_ids),
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": self.num_heads,
            "num_hidden_layers": self.num_layers,
            "num_key_value_heads": self.num_kv_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_scaling": scaling,
            "rope_theta": self.rope_theta,
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": self.dtype,
            "vocab_size": self.vocab_size,
        } | ({} if self.quantization is None else
             {"quantization_config": {"quant_method": _QUANT_METHOD, "format": self.quantization}})


# What these settings may be; any other value changes the computation in a way that is not written here.
_SUPPORTED = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "attention_dropout": (0, None),
    "pretraining_tp": (1,),
    "sliding_window": (None,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
# Read elsewhere, or without effect on inference.
_KNOWN = {
    "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "head_dim", "hidden_size", "intermediate_size",
    "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
    "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings", "dtype", "torch_dtype", "vocab_size",
    "initializer_range", "transformers_version", "use_cache", "_name_or_path", "id2label", "label2id",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "problem_type",
    "quantization_config",
}


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    if "model_type" not in raw:
        raise ConfigError("model_type is missing; a Llama checkpoint says \"llama\"")
    for name, allowed in _SUPPORTED.items():
        if name in raw and not any(raw[name] == value and isinstance(raw[name], bool) == isinstance(value, bool)
                                   for value in allowed):
            raise ConfigError(f"{name} {raw[name]!r} is not supported; this code computes {allowed[0]!r}")
    architectures = raw.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"]:
        raise ConfigError(f"architectures {architectures!r} is not supported; "
                          "this code computes ['LlamaForCausalLM']")
    for name in sorted(raw.keys() - _SUPPORTED.keys() - _KNOWN):
        raise ConfigError(f"{name!r} ({raw[name]!r}) is not a setting that this code knows; remove it from the "
                          "file if it has no effect on the computation")


def _read_rope(raw: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from `rope_theta` and `rope_scaling` or folded into `rope_parameters`."""
    field = "rope_scaling" if raw.get("rope_parameters") is None else "rope_parameters"
    settings = raw.get(field)
    if settings is not None and not isinstance(settings, dict):
        raise ConfigError(f"{field} must be an object, not {settings!r}")
    if field == "rope_parameters" and raw.get("rope_scaling") is not None:
        raise ConfigError("rope_parameters and rope_scaling are both given; keep the one that is meant")
    settings = settings or {}
    numbers = {f"{field}.{name}": value for name, value in settings.items()}  # refused by their full names
    theta = read_number(raw, "rope_theta", float, None)
    folded = read_number(numbers, f"{field}.rope_theta", float, None)
    if None not in (theta, folded) and theta != folded:
        raise ConfigError(f"rope_theta is {theta} but {field}.rope_theta is {folded}; keep the one that is meant")
    theta = read_number(raw, "rope_theta", float) if folded is None else folded
    if not settings.keys() - {"rope_theta"}:
        return theta, None
    kind = settings.get("rope_type", settings.get("type"))
    if kind not in ("llama3", "default"):
        raise ConfigError(f"rope_type {kind!r} is not supported; this code computes 'llama3' and 'default'")
    known = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    unknown = settings.keys() - {"rope_theta", "rope_type", "type"} - (known if kind == "llama3" else set())
    for name in sorted(unknown):
        raise ConfigError(f"{field}.{name} is not a setting of rope_type {kind!r}")
    if kind == "default":
        return theta, None
    factor, low, high = (read_number(numbers, f"{field}.{name}", float)
                         for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = read_number(numbers, f"{field}.original_max_position_embeddings", int)
    if factor < 1 or not 0 < low < high or original < 1:
        raise ConfigError(f"{field} {settings!r} is out of range: factor at least 1, "
                          "0 < low_freq_factor < high_freq_factor, original_max_position_embeddings at least 1")
    return theta, RopeScaling(factor, low, high, original)


def _read_dtype(raw: dict[str, Any]) -> str:
    name = raw.get("dtype") or raw.get("torch_dtype") or "bfloat16"
    if not isinstance(name, str) or name not in DTYPE_BYTES:
        raise ConfigError(f"dtype {name!r} is not supported; use one of {', '.join(DTYPE_BYTES)}")
    return name


def _read_quantization(raw: dict[str, Any]) -> str | None:
    """The format of a checkpoint that `llama quantize` wrote. Others' ways of rounding weights are not read."""
    settings = raw.get("quantization_config")
    if settings is None:
        return None
    if settings not in [{"quant_method": _QUANT_METHOD, "format": name} for name in STORED_FORMATS]:
        raise ConfigError(f"quantization_config {settings!r} is not supported; get the checkpoint as it was trained, and "
                          f"round it here: llama quantize, or --quantize {' or '.join(STORED_FORMATS)}")
    return settings["format"]
