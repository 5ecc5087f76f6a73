"""Reading ahead: Linux fetches a checkpoint's files into its cache while Python still imports torch."""

import os
import threading
from pathlib import Path

from llama.machine import available_memory


def read_ahead(directory: Path) -> None:
    """Ask for all weights in `directory`, in the background, without waiting (posix_fadvise(2)).

    Only asks: what cannot be read is for the loader to say. Weights that would take more than a third of the free memory
    are left alone, for the cache would lose the first of them before they are used.
    """
    files = sorted(directory.glob("*.safetensors"))
    if hasattr(os, "posix_fadvise") and sum(path.stat().st_size for path in files) <= available_memory() // 3:
        threading.Thread(target=_ask, args=(files,), daemon=True).start()


def _ask(files: list[Path]) -> None:
    for path in files:
        try:
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        except OSError:
            return
