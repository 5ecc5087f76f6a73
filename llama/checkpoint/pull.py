"""A model's name to a directory: one that is here, one in Hugging Face's cache, or one fetched from the hub.

huggingface_hub does the fetching, into its own cache, where transformers and others find the files too; what
was interrupted goes on where it stopped. Safetensors, JSON and the tokenizer are fetched, never a pickle.
"""

from pathlib import Path

from llama.checkpoint.safetensors import INDEX_NAME, SINGLE_NAME, read_weight_map

DEMO = Path(__file__).parents[1] / "demo"

_WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]
# Meta's own layout: the same weights once more.
_UNWANTED = ["original/*"]


class PullError(ValueError):
    """A name stands for no checkpoint that is here or can be fetched; the message says what to do."""


def resolve(name: str | Path | None) -> Path:
    """The directory of a checkpoint, given as such or by a hub id such as meta-llama/Llama-3.1-8B-Instruct; None: the
    embedded demo.

    A hub id that the local cache holds with all its weights does not touch the network. Raises PullError.
    """
    if name is None:
        return DEMO
    name = str(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise PullError(f"{name} is a file; name the directory of a checkpoint")
    if not _is_hub_id(name):
        raise PullError(f"{name!r} is no directory here, and no hub id such as "
                        "meta-llama/Llama-3.1-8B-Instruct")
    cached = _find_cached(name)
    if cached is not None and _find_missing(cached) is None:
        return cached
    directory = _download(name)
    missing = _find_missing(directory)
    if missing is not None:
        raise PullError(f"{name} has no {missing} in {directory}: either it is published without "
                        "safetensors, or the download is incomplete; connect and try again, or name another "
                        "checkpoint")
    return directory


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def _find_cached(hub_id: str) -> Path | None:
    """The cache's snapshot of the hub id, complete or not."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(hub_id, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def _find_missing(directory: Path) -> str | None:
    """The first file without which the directory holds no complete weights."""
    index = directory / INDEX_NAME
    weights = set(read_weight_map(index).values()) if index.is_file() else {SINGLE_NAME}
    needed = ["config.json", *sorted(weights)]
    return next((name for name in needed if not (directory / name).is_file()), None)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError

    elsewhere = "or copy the checkpoint's directory to this machine and give its path"
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except GatedRepoError:
        raise PullError(f"{hub_id} is gated: accept its licence on its page at the hub and log in with "
                        f"`hf auth login` (`huggingface-cli login` in older versions), {elsewhere}") from None
    except RepositoryNotFoundError:
        raise PullError(f"the hub has no {hub_id}, or shows it only to some: check the name and log in with "
                        f"`hf auth login` (`huggingface-cli login` in older versions), {elsewhere}") from None
    except Exception as error:  # of the HTTP library, which is another one in every second version
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise PullError(f"{hub_id} is no directory here, not complete in the local cache, and cannot be "
                        f"downloaded ({reason}); connect to the hub and try again, {elsewhere}") from error
