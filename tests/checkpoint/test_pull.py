"""Names to directories: local ones, the hub's cache, and a hub that is a function in the test."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.utils import GatedRepoError, RepositoryNotFoundError, filter_repo_objects

from llama.checkpoint.load import load_model
from llama.checkpoint.pull import PullError, resolve
from llama.checkpoint.safetensors import CheckpointError
from tests.checkpoint.drafts import FIRST, INDEX, SECOND, Draft

ID = "some-org/Some-Model-8B"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What a published repository holds.
PUBLISHED = ["config.json", "generation_config.json", INDEX, FIRST, SECOND, "tokenizer.json",
             "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model",
             "README.md", "LICENSE", ".gitattributes", "original/params.json",
             "original/consolidated.00.pth", "original/tokenizer.model",
             "original/consolidated.safetensors", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
             "model.pt", "USE_POLICY.md"]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put(cache: Path, *left_out: str, hub_id: str = ID) -> Path:
    """A checkpoint in the cache, as the hub's own client leaves it there, perhaps without some files."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (snapshot, repository / "refs", repository / "blobs", cache / "plain"):
        folder.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(COMMIT)
    Draft().write(cache / "plain")
    for path in (cache / "plain").iterdir():
        path.rename(repository / "blobs" / path.name)
        if path.name not in left_out and not (snapshot / path.name).exists():
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return snapshot


def hub(monkeypatch: pytest.MonkeyPatch, answer: Callable[..., Any]) -> list[dict[str, Any]]:
    """Put a function in the place of the network; returns the calls that it gets."""
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append({"repo_id": repo_id, **options})
        return str(answer())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def refuse(error: Exception) -> Callable[[], None]:
    def answer() -> None:
        raise error
    return answer


def http_error(kind: type[Exception]) -> Exception:
    """With as much of a response as the hub's errors look at, whichever HTTP library they are built on."""
    return kind("401 Client Error.", response=SimpleNamespace(headers={}, request=None, status_code=401))


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, lambda: tmp_path)
    assert resolve(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"
    assert not calls


@pytest.mark.parametrize("name", ["nowhere", "./org/name", "../name", "/no/where", "a/b/c", "org/na me",
                                  "org/", "org/na--me"])
def test_a_name_that_is_neither_is_refused(name: str, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PullError, match="is no directory here, and no hub id such as"):
        resolve(name)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"")
    with pytest.raises(PullError, match="model.gguf is a file; name the directory"):
        resolve(str(tmp_path / "model.gguf"))


def test_a_complete_snapshot_in_the_cache_needs_no_network(cache: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = put(cache)
    calls = hub(monkeypatch, refuse(AssertionError("the network was asked")))
    assert resolve(ID) == snapshot
    assert not calls
    assert load_model(resolve(ID)).config.num_layers == 2


def test_a_single_file_in_the_cache_is_complete_without_an_index(cache: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = put(cache, INDEX, FIRST, SECOND)
    hub(monkeypatch, refuse(ConnectionError("no network")))
    with pytest.raises(PullError):
        resolve(ID)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{FIRST}")
    assert resolve(ID) == snapshot


@pytest.mark.parametrize("missing", [FIRST, SECOND])
def test_an_incomplete_snapshot_is_completed(missing: str, cache: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache, missing)
    calls = hub(monkeypatch, lambda: put(cache))
    directory = resolve(ID)
    assert len(calls) == 1 and calls[0]["repo_id"] == ID
    load_model(directory)


def test_what_is_fetched_holds_no_pickle(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = hub(monkeypatch, lambda: put(cache))
    resolve(ID)
    patterns = {name: calls[0][name] for name in ("allow_patterns", "ignore_patterns")}
    assert set(filter_repo_objects(PUBLISHED, **patterns)) == {
        "config.json", "generation_config.json", INDEX, FIRST, SECOND, "tokenizer.json",
        "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "tokenizer.model"}


@pytest.mark.parametrize("cached", [False, True], ids=["nothing cached", "a shard missing"])
def test_without_network_the_error_says_what_to_do(cached: bool, cache: Path) -> None:
    """Through huggingface_hub itself, which is offline in tests."""
    assert constants.HF_HUB_OFFLINE
    if cached:
        put(cache, SECOND)
    with pytest.raises(PullError) as caught:
        resolve(ID)
    message = str(caught.value)
    assert ID in message and "connect" in message
    assert (SECOND if cached else "copy the checkpoint's directory to this machine and give its") in message
    assert "\n" not in message


def test_a_lost_connection_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, refuse(ConnectionError("Name or service not known\nand much more")))
    with pytest.raises(PullError, match=r"downloaded \(Name or service not known\); connect") as caught:
        resolve(ID)
    assert "much more" not in str(caught.value)


def test_a_gated_repository_asks_for_licence_and_login(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, refuse(http_error(GatedRepoError)))
    with pytest.raises(PullError, match=f"{ID} is gated: accept its licence .* log in with `hf auth login`"):
        resolve(ID)


def test_an_unknown_repository_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, refuse(http_error(RepositoryNotFoundError)))
    with pytest.raises(PullError, match=f"the hub has no {ID}.*check the name"):
        resolve(ID)


def test_a_repository_of_pickles_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub(monkeypatch, lambda: put(cache, INDEX, FIRST, SECOND))
    with pytest.raises(PullError, match="has no model.safetensors in .*published without safetensors"):
        resolve(ID)


def test_a_damaged_index_in_the_cache_is_named(cache: Path) -> None:
    snapshot = put(cache)
    (snapshot / INDEX).unlink()
    (snapshot / INDEX).write_text(json.dumps({"weight_map": {"a": "../../b"}}))
    with pytest.raises(CheckpointError, match=INDEX):
        resolve(ID)
