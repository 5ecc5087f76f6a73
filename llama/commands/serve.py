"""`llama serve`: see `server.serve`."""

from server.serve import run

__all__ = ["run"]
