"""Checkpoints that are damaged, hostile or not what their configuration says: refused, by file and tensor."""

import json
from pathlib import Path

import pytest

from llama.checkpoint import load
from llama.checkpoint.load import load_model
from llama.checkpoint.safetensors import CheckpointError, read_header
from tests.checkpoint.drafts import CONFIG, FIRST, HEAD, SECOND, Draft, write_file
from tests.checkpoint.spoiled import CASES, FIRST_OF_SECOND, Case, shrink_while_it_is_read


def forbid(*arguments: object) -> None:
    """In the place of the model: nothing may be allocated for a checkpoint that is refused."""
    raise AssertionError("a model was built")


def refusal(directory: Path) -> str:
    """The one error that loading ends in, without the directory's name, which is that of the test."""
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    assert type(caught.value) is CheckpointError
    return str(caught.value).replace(str(directory), "DIRECTORY")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name[:60])
def test_refused_by_name(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "Llama", forbid)
    draft = Draft()
    case.spoil_draft(draft)
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    draft.write(directory)
    case.spoil_directory(directory)

    message = refusal(directory)
    for fragment in case.fragments:
        assert fragment in message
    assert len(message) < 700 and message.isprintable()


def test_there_are_at_least_forty_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


@pytest.mark.parametrize("dtype", ["int8", "float64", "auto", ""])
def test_an_unknown_dtype_to_load_to_is_refused(dtype: str, tmp_path: Path) -> None:
    Draft().write(tmp_path)
    with pytest.raises(CheckpointError, match=f"dtype '{dtype}' is not supported; use one of float32"):
        load_model(tmp_path, dtype=dtype)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    Draft().write(tmp_path)
    shrink_while_it_is_read(tmp_path / SECOND, monkeypatch)
    assert f"{SECOND} became shorter while tensor '{HEAD}'" in refusal(tmp_path)


def test_a_file_that_disappears_while_it_is_read_is_an_error(tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    Draft().write(tmp_path)
    build = load.Llama

    def remove_and_build(*arguments: object) -> load.Llama:
        (tmp_path / SECOND).unlink()
        return build(*arguments)

    monkeypatch.setattr(load, "Llama", remove_and_build)
    assert f"{SECOND}: tensor '{FIRST_OF_SECOND}' cannot be read: No such file" in refusal(tmp_path)


def test_tensors_may_stand_in_any_order_in_the_header(tmp_path: Path) -> None:
    draft = Draft()
    draft.headers[SECOND] = dict(reversed(draft.headers[SECOND].items()))
    draft.write(tmp_path)
    assert load_model(tmp_path).config.num_layers == CONFIG["num_hidden_layers"]


def test_the_header_may_be_padded(tmp_path: Path) -> None:
    write_file(tmp_path / "a.safetensors", b"{}" + b" " * 14)
    assert read_header(tmp_path / "a.safetensors") == {}


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    draft = Draft()
    header, first_bytes = draft.headers[FIRST], len(draft.data[FIRST])
    for name, entry in draft.headers[SECOND].items():
        header[name] = entry | {"data_offsets": [offset + first_bytes for offset in entry["data_offsets"]]}
    (tmp_path / "config.json").write_text(json.dumps(draft.config))
    write_file(tmp_path / "model.safetensors", json.dumps(header).encode(),
               draft.data[FIRST] + draft.data[SECOND])
    single = load_model(tmp_path)

    sharded_directory = tmp_path / "sharded"
    sharded_directory.mkdir()
    Draft().write(sharded_directory)
    sharded = dict(load_model(sharded_directory).named_parameters())
    assert all(parameter.equal(sharded[name]) for name, parameter in single.named_parameters())
