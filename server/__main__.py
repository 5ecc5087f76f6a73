"""`python -m server`: the same as `llama serve`."""

import argparse
import sys

from server.flags import ABOUT, add_flags
from server.serve import run

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m server", description=ABOUT)
    add_flags(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sys.exit(run(parser.parse_args()))
