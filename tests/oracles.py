"""Files of others that tests compare with: found or fetched, checked by their hash, never committed."""

import functools
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

META_TOKENIZER_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"
JSON_SCHEMA_SUITE_SHA256 = "bc61f6be11daecec06b45fcd8290bfb8212b2524aa23f6ebe89d851225634d50"
OFFICIAL_TEMPLATE_SHA256 = "e10ca381b1ccc5cf9db52e371f3b6651576caee0a630b452e2816b2d404d4b65"

# This package carries a byte-exact copy of the chat template published with Llama 3.1.
_TEMPLATE_PACKAGE = "ldp==1.10.0"
_TEMPLATE_IN_WHEEL = "ldp/nn/chat_templates/llama3.1_chat_template_hf.jinja"

# The source of this one carries the suite; its built form does not.
_SUITE_PACKAGE = "jsonschema==4.25.1"
_SUITE_IN_SOURCE = r".*/json/tests/draft2020-12/(\w[\w-]*|optional/\w[\w-]*)\.json"


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
    """The chat template of Llama 3.1 Instruct: downloaded with pip the first time, then read from the cache."""
    file = _cached("llama3.1_chat_template.jinja", _download_template)
    content = file.read_bytes()
    _check(content, OFFICIAL_TEMPLATE_SHA256, file)
    return content.decode("utf-8")


@functools.cache
def json_schema_suite() -> dict[str, list[dict]]:
    """The public JSON Schema test suite, draft 2020-12, by the names of its files: downloaded with pip the first
    time, inside of the source of the package jsonschema, then read from the cache."""
    file = _cached("json_schema_suite.json", _download_suite)
    _check(file.read_bytes(), JSON_SCHEMA_SUITE_SHA256, file)
    return json.loads(file.read_text("utf-8"))


def _cached(name: str, download: Callable[[str], bytes]) -> Path:
    """A file in the cache: the folder in LLAMA_TEST_CACHE, by default ~/.cache/llama-tests."""
    cache = Path(os.environ.get("LLAMA_TEST_CACHE") or Path.home() / ".cache" / "llama-tests")
    file = cache / name
    if not file.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            fetched = Path(folder) / file.name
            fetched.write_bytes(download(folder))
            fetched.replace(file)
    return file


def _download_template(folder: str) -> bytes:
    _pip_download(_TEMPLATE_PACKAGE, folder)
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(_TEMPLATE_IN_WHEEL)


def _download_suite(folder: str) -> bytes:
    _pip_download(_SUITE_PACKAGE, folder, "--no-binary", ":all:")
    (source,) = Path(folder).glob("*.tar.gz")
    with tarfile.open(source) as archive:
        files = {re.sub(_SUITE_IN_SOURCE, r"\1", name): json.load(archive.extractfile(name))
                 for name in sorted(archive.getnames()) if re.fullmatch(_SUITE_IN_SOURCE, name)}
    return json.dumps(files).encode()


def _pip_download(package: str, folder: str, *options: str) -> None:
    command = ["pip", "download", "--quiet", "--no-deps", *options, "--dest", folder, package]
    outcome = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    if outcome.returncode:
        raise RuntimeError(f"could not download {package}:\n{outcome.stderr}")


def _check(content: bytes, sha256: str, file: Path) -> None:
    if hashlib.sha256(content).hexdigest() != sha256:
        raise RuntimeError(f"{file} does not have the sha256 {sha256}: delete it and run the tests again")
