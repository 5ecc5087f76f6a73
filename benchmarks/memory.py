"""From nothing to a first token: peak memory against the weights' size, and time against that of reading the files.

    python -m benchmarks.memory --model DIR [--formats bf16,int8,int4] [--prompt 8] [--device cuda] [--json]

Every measurement is a process of its own, which begins with Python's start. Before each, and before the files are read
plainly for comparison, the system forgets the files (posix_fadvise), so that all come from the disk; with --warm it
reads them all first, so that none do. --prompt sets how many tokens are read: what the activations add to the peak. With
--device cuda the peak is still that of the process on the host, and the first turn is what compiles the kernels.
"""

import argparse
import multiprocessing
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.common import begin, finish, interleaved, show, spread, summary
from benchmarks.formats import FORMATS

_PIECE_BYTES = 8 << 20


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a checkpoint directory; random weights will do")
    parser.add_argument("--formats", default="bf16,int8,int4", help="separated by commas (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=8, help="tokens (default %(default)s)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="with the files in the system's cache")
    args, machine = begin(parser, on_gpu=True)
    files = sorted(args.model.glob("*.safetensors"))
    prepare = read if args.warm else forget
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in args.formats.split(",")}

    def reading() -> float:
        prepare(files)
        return read(files)

    def starting(name: str) -> float:
        prepare(files)
        runs[name].append(start(args.model, name, args.prompt, args.threads, args.device))
        return runs[name][-1]["total"]

    contestants = {"reading": reading} | {name: lambda name=name: starting(name) for name in runs}
    taken = interleaved(contestants, args.turns)
    base = summary(taken.pop("reading"))
    num_bytes = sum(path.stat().st_size for path in files)
    print(f"\n{num_bytes / 1e9:.2f} GB of files, read in {spread(base)} s "
          f"({num_bytes / base['median'] / 1e9:.2f} GB/s, {'warm' if args.warm else 'cold'})")
    results: dict[str, Any] = {"machine": machine, "model": str(args.model), "warm": args.warm, "file_bytes": num_bytes,
                               "reading": base, "formats": {}}
    rows = []
    for name, each in runs.items():
        found = {kind: summary([run[kind] for run in each]) for kind in each[0]}
        found["peak_ratio"] = summary([run["peak"] / run["weights"] for run in each])
        found["reading_ratio"] = summary([total / base["median"] for total in taken[name]])
        results["formats"][name] = found
        rows.append([name, f"{found['weights']['median'] / 1e9:.3f}", f"{found['peak']['median'] / 1e9:.3f}",
                     spread(found["peak_ratio"]), *(spread(found[kind]) for kind in ("imports", "loading", "first")),
                     spread(found["total"]), f"{found['reading_ratio']['median']:.2f}"])
    show(f"To the first token after {args.prompt}, {args.turns} turns",
         ["format", "weights GB", "peak GB", "peak / weights", "s to start Python and import", "s to load",
          "s to the token", "s in all", "times reading"], rows)
    finish(results, args.json)


def start(directory: Path, name: str, prompt_len: int, num_threads: int, device: str = "cpu") -> dict[str, float]:
    """One process from its start to its first token: seconds of each part, and bytes."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    began = time.time()
    process = context.Process(target=_measure, args=(theirs, began, directory, FORMATS[name][0], prompt_len,
                                                     num_threads, device))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise RuntimeError(f"the process that loads {name} did not come to an end") from None
    finally:
        process.join()


def _measure(pipe: Connection, began: float, directory: Path, options: dict[str, Any], prompt_len: int,
             num_threads: int, device: str) -> None:
    from llama.checkpoint.ahead import read_ahead

    read_ahead(directory)
    import torch

    from benchmarks.contestants import Ours
    from benchmarks.weights import Source
    from llama.machine import peak_memory

    torch.set_num_threads(num_threads)
    imported = time.time()
    model = Ours(Source(directory), options, prompt_len + 2, device)
    loaded = time.time()
    model.turn(range(prompt_len), 0)
    ended = time.time()
    pipe.send({"imports": imported - began, "loading": loaded - imported, "first": ended - loaded,
               "total": ended - began, "peak": peak_memory(), "weights": model.facts()["weight_bytes"]})


def forget(files: Sequence[Path]) -> None:
    """Have the system drop what it has cached of files that are written to disk already."""
    os.sync()
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: Sequence[Path]) -> float:
    """Read files piece by piece, in as many threads as there are processors, and keep nothing: seconds."""
    pieces = [(path, offset) for path in files for offset in range(0, path.stat().st_size, _PIECE_BYTES)]

    def read_piece(piece: tuple[Path, int]) -> None:
        path, offset = piece
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            file.readinto(bytearray(_PIECE_BYTES))

    began = time.perf_counter()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(read_piece, pieces))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
