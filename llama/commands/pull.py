"""`llama pull`: a checkpoint from the hub to the disk."""

import argparse

from llama.checkpoint.pull import resolve


def run(args: argparse.Namespace) -> int:
    """Print the directory in which the checkpoint now lies."""
    print(resolve(args.name))
    return 0
