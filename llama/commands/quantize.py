"""`llama quantize`: a checkpoint with its weights rounded, written once, to be loaded in the time that it takes to read it."""

import argparse
import shutil
from pathlib import Path

from llama.checkpoint.pull import resolve
from llama.commands import CommandError
from llama.commands.report import size
from llama.config import LlamaConfig

# What a checkpoint has beside its weights, and its licence, which goes where they go.
_BESIDE = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
           "generation_config.json", "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md")


def run(args: argparse.Namespace) -> int:
    """Read, round, write. What can be refused is refused before the weights are read. Raises CommandError."""
    source, out = resolve(args.model), Path(args.out).expanduser()
    config = LlamaConfig.from_directory(source)
    if config.quantization is not None:
        raise CommandError(f"{source} is quantised to {config.quantization} already; name the checkpoint as it was trained")
    _make_room(out, config.num_weight_bytes(args.dtype, args.format))
    from llama.checkpoint.load import load_model
    from llama.checkpoint.save import save_model

    model = load_model(source, dtype=args.dtype, weights=args.format)
    save_model(model, out)
    for name in _BESIDE:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
    print(f"{out}: {size(model.num_bytes)} in {args.format}, where {config.dtype} takes {size(config.num_weight_bytes())}")
    return 0


def _make_room(out: Path, num_bytes: int) -> None:
    """An empty directory on a disk that is large enough."""
    if out.exists() and not out.is_dir():
        raise CommandError(f"{out} is a file; name a directory that does not exist yet, or an empty one")
    if out.is_dir() and any(out.iterdir()):
        raise CommandError(f"{out} is not empty; name a directory that does not exist yet, or an empty one")
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < num_bytes:
        raise CommandError(f"{out} has {size(free)} free, but the weights take {size(num_bytes)}; name a directory on "
                           "another disk")
