"""Where a measured model's weights come from: a checkpoint, or nothing but a shape, which random ones then fill in place.

    python -m benchmarks.decode --random 8b --device cuda        no files: drawn where they are wanted, in seconds
    python -m benchmarks.weights DIR --random 8b --device cuda   the same ones as a checkpoint, for what reads files

Drawn weights are normal, never zeros, on which hardware is faster than on anything real. On one kind of device a name's
values are always the same, whatever format they are then rounded to and whoever computes with them.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.layout import places
from llama.checkpoint.load import fastest_weights, load_model
from llama.config import LlamaConfig
from llama.model.transformer import Llama

# Elements that are drawn at a time: enough to fill a GPU, and in float32 nothing beside the weights.
_PIECE = 1 << 25
_PIECE_ROWS = 32  # pieces are whole multiples: what every packed format stores together


@dataclass(frozen=True)
class Source:
    """A checkpoint's directory, or a published shape ("8b"; "8b:2" has two layers) for random weights."""

    directory: Path | None = None
    shape: str | None = None

    def __str__(self) -> str:
        return f"random {self.shape}" if self.directory is None else str(self.directory)

    @property
    def raw_config(self) -> dict[str, Any]:
        """What stands, or would stand, in config.json."""
        if self.directory is not None:
            return json.loads((self.directory / "config.json").read_text("utf-8"))
        from tools.make_checkpoint import make_config  # not where files are read: such a start is timed

        name, _, layers = self.shape.partition(":")
        return make_config(name, {"num_hidden_layers": int(layers)} if layers else {})

    @property
    def config(self) -> LlamaConfig:
        """The model's numbers."""
        return LlamaConfig.from_dict(self.raw_config) if self.directory is None \
            else LlamaConfig.from_directory(self.directory)

    @torch.inference_mode(False)  # whoever asks: a loader's threads could not fill what was made in that mode
    def model(self, dtype: str | None = None, quantize: str | None = None, device: str = "cpu") -> Llama:
        """The model, in a format of `llama.model.formats` or as it is multiplied fastest without being rounded."""
        if self.directory is not None:
            return load_model(self.directory, dtype=dtype, device=device, weights=quantize or "fastest", progress=False)
        dtype = dtype or self.config.dtype
        model = Llama(self.config, getattr(torch, dtype), device, quantize or fastest_weights(dtype, device))
        for name, place in places(self.config).items():
            module = model.get_submodule(place.module)
            for first, rows in draw(name, place.shape, model.dtype, device):
                if hasattr(module, "store"):
                    module.store(place.first_row + first, rows)
                else:
                    module.weight.data[first:first + len(rows)].copy_(rows)  # a norm
        return model


def draw(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[tuple[int, Tensor]]:
    """A tensor's random values, piece by piece: the first row, and [rows, ...] of `dtype` on the device."""
    from tools.make_checkpoint import weight_distribution

    mean, std = weight_distribution(name, shape)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")
    generator = torch.Generator(device).manual_seed(seed)
    num_rows, *columns = shape
    step = max(_PIECE // max(shape[-1], 1) // _PIECE_ROWS, 1) * _PIECE_ROWS if columns else num_rows
    for first in range(0, num_rows, step):
        rows = torch.empty(min(step, num_rows - first), *columns, device=device)
        # float32 first: drawn in bfloat16, a normal distribution has only some hundred different values
        yield first, rows.normal_(mean, std, generator=generator).to(dtype)


def add_source(parser: argparse.ArgumentParser) -> None:
    """The flags --model and --random, of which one has to be given."""
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--model", type=Path, help="a checkpoint directory; random weights will do")
    group.add_argument("--random", metavar="SHAPE", help="8b, 1b, tiny, ...: random weights, without any file")


def source_of(args: argparse.Namespace) -> Source:
    """What the flags say."""
    return Source(args.model, args.random)


def main() -> None:
    """Write drawn weights as a checkpoint, with the demo's tokenizer, so that it can be served."""
    from llama.checkpoint.save import write_checkpoint
    from tools.make_checkpoint import make_generation_config, put_tokenizer

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the directory to write; /dev/shm/8b is read back fastest")
    parser.add_argument("--random", metavar="SHAPE", required=True)
    parser.add_argument("--device", default="cpu", help="where they are drawn (default %(default)s)")
    args = parser.parse_args()
    source = Source(None, args.random)
    shapes = {name: place.shape for name, place in places(source.config).items()}
    dtype = getattr(torch, source.config.dtype)
    args.out.mkdir(parents=True, exist_ok=True)
    put_tokenizer(Path(__file__).parents[1] / "llama/demo", args.out, source.config.vocab_size)
    (args.out / "generation_config.json").write_text(json.dumps(make_generation_config(source.raw_config)))
    write_checkpoint(args.out, source.raw_config, shapes, source.config.dtype,
                     lambda name: (rows.cpu() for _, rows in draw(name, shapes[name], dtype, args.device)))


if __name__ == "__main__":
    main()
