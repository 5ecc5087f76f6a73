"""Files of others that tests compare with: found or fetched, checked by their hash, never committed."""

import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

META_TOKENIZER_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
OFFICIAL_TEMPLATE_SHA256 = "e10ca381b1ccc5cf9db52e371f3b6651576caee0a630b452e2816b2d404d4b65"

# This package carries a byte-exact copy of the chat template published with Llama 3.1.
_TEMPLATE_PACKAGE = "ldp==1.10.0"
_TEMPLATE_IN_WHEEL = "ldp/nn/chat_templates/llama3.1_chat_template_hf.jinja"


@functools.cache
def meta_tokenizer_file() -> Path:
    """Meta's tokenizer.model for Llama 3, in the installed package llama-models (the test extra)."""
    package = importlib.util.find_spec("llama_models")
    if package is None:
        raise RuntimeError("llama_models is missing: install the test extra (pip install '.[test]')")
    file = Path(package.submodule_search_locations[0]) / "llama3" / "api" / "tokenizer.model"
    _check(file.read_bytes(), META_TOKENIZER_SHA256, file)
    return file


@functools.cache
def official_template() -> str:
    """The chat template of Llama 3.1 Instruct: downloaded with pip the first time, then read from the cache.

    The cache is the folder in LLAMA_TEST_CACHE, by default ~/.cache/llama-tests.
    """
    cache = Path(os.environ.get("LLAMA_TEST_CACHE") or Path.home() / ".cache" / "llama-tests")
    file = cache / "llama3.1_chat_template.jinja"
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            fetched = Path(folder) / file.name
            fetched.write_bytes(_download_template(folder))
            fetched.replace(file)
    content = file.read_bytes()
    _check(content, OFFICIAL_TEMPLATE_SHA256, file)
    return content.decode("utf-8")


def _download_template(folder: str) -> bytes:
    command = ["pip", "download", "--quiet", "--no-deps", "--dest", folder, _TEMPLATE_PACKAGE]
    outcome = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if outcome.returncode:
        raise RuntimeError(f"could not download {_TEMPLATE_PACKAGE} for its chat template:\n{outcome.stderr}")
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(_TEMPLATE_IN_WHEEL)


def _check(content: bytes, sha256: str, file: Path) -> None:
    if hashlib.sha256(content).hexdigest() != sha256:
        raise RuntimeError(f"{file} does not have the sha256 {sha256}: delete it and run the tests again")
