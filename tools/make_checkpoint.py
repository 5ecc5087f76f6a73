"""Write a checkpoint of random weights in any Llama shape, as Hugging Face lays it out: to measure and test.

    python -m tools.make_checkpoint OUT --shape 8b --layers 2 --tokenizer DIR

The files are those that the published model has: the same names, fields, dtype and shards. A few megabytes of
them are in memory at a time. The same seed gives the same weights on the same version of torch, whatever else
is asked for: a layer cut off with --layers changes none of the others.
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llama
from llama.checkpoint.layout import places
from llama.checkpoint.save import write_checkpoint
from llama.config import DTYPE_BYTES, LlamaConfig
from llama.progress import ProgressBar, describe_bytes
from llama.text.tokenizer import Tokenizer
from tools.heavy_tails import element_sizes, heavy_block

# What differs between the published models. `tiny` is none of them: it is small enough for a test, and with
# --vocab-size 128256 takes the real tokenizer.
_SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 14336},
    "70b": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
            "intermediate_size": 28672},
    "405b": {"hidden_size": 16384, "num_hidden_layers": 126, "num_attention_heads": 128,
             "num_key_value_heads": 8, "intermediate_size": 53248},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
           "intermediate_size": 8192, "head_dim": 64, "tie_word_embeddings": True,
           "transformers_version": "4.45.0.dev0"},
    "3b": {"hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
           "intermediate_size": 8192, "head_dim": 128, "tie_word_embeddings": True,
           "transformers_version": "4.45.0.dev0"},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 192, "vocab_size": 512},
}
# Flags that put a number in the place of the shape's, and the setting of config.json that each is.
_NUMBERS = {
    "--hidden-size": "hidden_size", "--layers": "num_hidden_layers", "--heads": "num_attention_heads",
    "--kv-heads": "num_key_value_heads", "--head-dim": "head_dim", "--intermediate-size": "intermediate_size",
    "--vocab-size": "vocab_size",
}
# Elements that are generated at a time, each block from a seed of its own, so that threads share a tensor.
_BLOCK = 1 << 20


def make_config(shape: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a published shape (the Instruct model's), with some settings changed."""
    chosen = _SHAPES[shape] | changes
    vocab_size = chosen.get("vocab_size", 128256)
    first_special = max(vocab_size - 256, 0)
    end_ids = [first_special + offset for offset in (1, 8, 9)]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": first_special,
        "eos_token_id": [token_id for token_id in end_ids if token_id < vocab_size],
        "head_dim": None,
        "hidden_act": "silu",
        "hidden_size": None,
        "initializer_range": 0.02,
        "intermediate_size": None,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": None,
        "num_hidden_layers": None,
        "num_key_value_heads": None,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0 if shape in ("1b", "3b") else 8.0, "high_freq_factor": 4.0,
                         "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
                         "rope_type": "llama3"},
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    # 3.1 has no head_dim
    return {name: value for name, value in (config | chosen).items() if value is not None}


def make_generation_config(config: dict[str, Any]) -> dict[str, Any]:
    """The generation_config.json beside it."""
    return {
        "bos_token_id": config["bos_token_id"],
        "do_sample": True,
        "eos_token_id": config["eos_token_id"],
        "temperature": 0.6,
        "top_p": 0.9,
        "transformers_version": config["transformers_version"],
    }


def weight_distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation with which activations stay near 1 at any width and depth.

    A matrix keeps the size of its input. What layer n adds to the residual stream shrinks with 1/sqrt(n + 1):
    the stream's variance grows with the logarithm of depth, and no tensor depends on how many layers follow.
    """
    if len(shape) == 1:
        return 1.0, 0.05
    std = shape[1] ** -0.5
    layer = re.match(r"model\.layers\.(\d+)\..*(o_proj|down_proj)", name)
    return 0.0, std / math.sqrt(2 * (int(layer[1]) + 1)) if layer else std


def random_tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int,
                  pool: ThreadPoolExecutor, heavy_tails: bool = False) -> Iterator[Tensor]:
    """A tensor's values in blocks [elements] of `dtype`, in order; they depend on name, shape and seed, and on
    whether tails are to be heavy (`tools.heavy_tails`)."""
    mean, std = weight_distribution(name, shape)

    def block(number: int, length: int) -> Tensor:
        digest = hashlib.sha256(f"{seed}/{name}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        if heavy_tails:
            values = mean + std * heavy_block(length, generator)
            return (values * element_sizes(name, shape, number * _BLOCK, length, seed)).to(dtype)
        # float32 first: drawn in bfloat16, a normal distribution has only some hundred different values
        return torch.empty(length).normal_(mean, std, generator=generator).to(dtype)

    num_elements = math.prod(shape)
    waiting: deque[Future[Tensor]] = deque()
    for number, first in enumerate(range(0, num_elements, _BLOCK)):
        waiting.append(pool.submit(block, number, min(_BLOCK, num_elements - first)))
        if len(waiting) > 8:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def put_tokenizer(source: Path, directory: Path, vocab_size: int) -> None:
    """Copy tokenizer and chat template into `directory`, from a directory that has them or from the one file.

    Meta's tokenizer.model is rewritten as tokenizer.json. Without a chat template the demo's is taken.
    Raises ValueError if the tokenizer has more tokens than the model.
    """
    if source.is_dir():
        found = [source / name for name in ("tokenizer.json", "tokenizer.model") if (source / name).is_file()]
        if not found:
            raise ValueError(f"{source} holds neither tokenizer.json nor tokenizer.model")
        source = found[0]
    if source.suffix == ".model":
        Tokenizer.from_tiktoken_file(source).save(directory)
    else:
        shutil.copyfile(source, directory / "tokenizer.json")
    num_tokens = Tokenizer.from_directory(directory).vocab_size
    if num_tokens > vocab_size:
        raise ValueError(f"{source} has {num_tokens} tokens and the model only {vocab_size}; "
                         f"give --vocab-size {num_tokens} or another tokenizer")
    beside = [source.parent / name for name in ("tokenizer_config.json", "chat_template.jinja")]
    if not any(path.is_file() for path in beside):
        beside = [Path(llama.__file__).parent / "demo" / path.name for path in beside]
    for path in beside:
        if path.is_file():
            shutil.copyfile(path, directory / path.name)


def make_checkpoint(directory: Path, config: dict[str, Any], *, seed: int, shard_bytes: int,
                    tokenizer: Path | None = None, heavy_tails: bool = False) -> LlamaConfig:
    """Write the whole checkpoint. Raises ValueError (of which ConfigError, CheckpointError) or OSError."""
    parsed = LlamaConfig.from_dict(config)
    dtype = getattr(torch, parsed.dtype)
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        put_tokenizer(tokenizer, directory, parsed.vocab_size)
    generation = json.dumps(make_generation_config(config), indent=2) + "\n"
    (directory / "generation_config.json").write_text(generation)
    shapes = {name: place.shape for name, place in places(parsed).items()}
    num_threads = os.cpu_count() or 1
    with (ThreadPoolExecutor(num_threads) as pool,
          ProgressBar("writing", parsed.num_weight_bytes(), describe_bytes) as bar):
        def pieces(name: str) -> Iterator[Tensor]:
            for piece in random_tensor(name, shapes[name], dtype, seed, pool, heavy_tails):
                yield piece
                bar.add(piece.nbytes)

        write_checkpoint(directory, config, shapes, parsed.dtype, pieces, max_shard_bytes=shard_bytes)
    return parsed


def parse_bytes(text: str) -> int:
    """ "5GB", "300MB", "64KB" or a number of bytes; decimal, as Hugging Face counts."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|[KMG]B)", text.strip().upper())
    size = int(float(match[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB")
    return size


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Write a checkpoint of random weights in Hugging Face's "
                                                 "layout.")
    parser.add_argument("out", type=Path, help="the directory to write")
    parser.add_argument("--shape", choices=_SHAPES, required=True, help="a published shape, or tiny")
    for flag, setting in _NUMBERS.items():
        parser.add_argument(flag, dest=setting, type=int, metavar="N", help=f"another {setting} than the "
                                                                            "shape's")
    parser.add_argument("--tie", dest="tie_word_embeddings", action=argparse.BooleanOptionalAction,
                        help="whether embedding and head are one matrix, if not as in the shape")
    parser.add_argument("--dtype", dest="torch_dtype", choices=DTYPE_BYTES, help="default bfloat16")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other weights (default 0)")
    parser.add_argument("--shard-bytes", type=parse_bytes, default="5GB", metavar="SIZE",
                        help="the most that one file holds (default 5GB, as published)")
    parser.add_argument("--tokenizer", type=Path, metavar="PATH",
                        help="tokenizer.json, Meta's tokenizer.model, or a directory with one of them, to "
                             "put beside")
    parser.add_argument("--heavy-tails", action="store_true",
                        help="weights with heavy tails and outlier channels, as trained ones have them")
    args = parser.parse_args(arguments)
    settings = [*_NUMBERS.values(), "tie_word_embeddings", "torch_dtype"]
    changes = {name: getattr(args, name) for name in settings if getattr(args, name) is not None}
    # Blocks are generated side by side, so each is left to one thread.
    torch.set_num_threads(1)
    try:
        config = make_checkpoint(args.out, make_config(args.shape, changes), seed=args.seed,
                                 shard_bytes=args.shard_bytes, tokenizer=args.tokenizer,
                                 heavy_tails=args.heavy_tails)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{args.out}: {config.num_parameters:,} parameters, {config.num_weight_bytes():,} bytes "
          f"{config.dtype}")


if __name__ == "__main__":
    main()
