"""Flags that several commands share: which checkpoint, and how it is run."""

import argparse
import re

from llama.config import DTYPE_BYTES, QUANTISED_BITS, QUANTISED_KV

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4,
          "KI": 1024, "MI": 1024**2, "GI": 1024**3, "TI": 1024**4}


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """--model and what it is loaded as."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="M",
                       help="directory of a checkpoint, or hub id; by default the demo model")
    group.add_argument("--dtype", choices=tuple(DTYPE_BYTES),
                       help="dtype of weights and KV cache; by default the checkpoint's own")
    group.add_argument("--quantize", choices=tuple(QUANTISED_BITS),
                       help="round the weights to 8 or 4 bits while they are read: less memory, more speed, some loss; "
                       "fp8: on a GPU")
    group.add_argument("--kv-cache-dtype", choices=QUANTISED_KV,
                       help="keep keys and values at 8 bits: about half the memory, some loss")
    group.add_argument("--device", default="cpu", metavar="D", help="cpu (the default), cuda or cuda:N")
    group.add_argument("--threads", type=count, metavar="N",
                       help="CPU threads; by default as many as torch chooses")
    group.add_argument("--context", type=count, metavar="N",
                       help="tokens of prompt and reply together, at most; by default what the model was "
                       "made for")


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """How the engine runs it."""
    group = parser.add_argument_group("engine")
    group.add_argument("--kv-cache", type=size, metavar="SIZE",
                       help="memory for keys and values, such as 4GiB; by default what can be used, but at "
                       "most half of what is free; of a GPU, nearly all")
    guesses = group.add_mutually_exclusive_group()
    guesses.add_argument("--prompt-lookup", action="store_true",
                         help="guess repeated text ahead: the same output, faster where it copies")
    guesses.add_argument("--draft", metavar="M",
                         help="let a smaller checkpoint with the same tokenizer guess ahead")
    group.add_argument("--deterministic", action="store_true", help="the same bits for a request whatever it "
                       "shares the engine with, at some cost in speed")


def count(text: str) -> int:
    """An integer from 1 up."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 up")
    return int(text)


def size(text: str) -> int:
    """Bytes, with or without a unit: 4GiB, 500MB, 1000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?I?)B?", text.upper())
    if not match or match[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 4GiB or 500MB")
    return int(float(match[1]) * _UNITS[match[2]])
