"""`python -m llama` is the `llama` command."""

import sys

from llama.cli import main

if __name__ == "__main__":
    sys.exit(main())
