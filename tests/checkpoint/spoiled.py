"""What can be wrong with a checkpoint, by name: how to spoil a draft, and what the error has to say."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from llama.checkpoint import load
from tests.checkpoint.drafts import (EMBED, FIRST, HEAD, INDEX, NORM, SECOND, Draft, layer, read_file,
                                     write_file)

SINGLE, THIRD = "model.safetensors", "model-00003-of-00003.safetensors"
GATE, UP, DOWN = layer(0, "mlp.gate_proj"), layer(0, "mlp.up_proj"), layer(0, "mlp.down_proj")
K = layer(1, "self_attn.k_proj")
FIRST_OF_SECOND = layer(1, "self_attn.v_proj")


@dataclass
class Case:
    """Something wrong with a checkpoint, before or after it is written, and what the error has to say."""

    name: str
    fragments: tuple[str, ...]
    spoil_draft: Callable[[Draft], object] = lambda draft: None
    spoil_directory: Callable[[Path], object] = lambda directory: None


def in_header(name: str, tensor: str, problem: str, **entry: object) -> Case:
    """Other values in one tensor's entry of a header; `...` takes a value out."""
    def spoil(draft: Draft) -> None:
        found = draft.find(tensor)
        found |= entry
        for key in [key for key, value in found.items() if value is ...]:
            del found[key]
    shard = FIRST if tensor in Draft().headers[FIRST] else SECOND
    return Case(name, (shard, tensor, problem), spoil)


def in_config(name: str, *fragments: str, **settings: object) -> Case:
    """Other values in config.json."""
    return Case(name, fragments, lambda draft: draft.config.update(settings))


def in_map(name: str, *fragments: str, **placed: object) -> Case:
    """The tensor lm_head.weight lies elsewhere, by the index; or another is named there as well."""
    return Case(name, fragments, lambda draft: draft.weight_map.update(
        {HEAD if key == "head" else key: shard for key, shard in placed.items()}))


def on_disk(name: str, spoil: Callable[[Path], object], *fragments: str) -> Case:
    """Something done to the files once they are written."""
    return Case(name, fragments, spoil_directory=spoil)


def pickled(name: str) -> Case:
    """A directory whose weights are a pickle."""
    return on_disk(f"{name} alone", lambda d: (only(d, "config.json"), (d / name).write_bytes(b"\x80")), name,
                   "is a pickle", "never opened", "get the safetensors version")


def with_header(name: str, header: bytes, *fragments: str) -> Case:
    """Another header in the first shard."""
    return on_disk(name, lambda directory: write_file(directory / FIRST, header), FIRST, *fragments)


def as_index(name: str, content: str, *fragments: str) -> Case:
    """Another index."""
    return on_disk(name, lambda directory: (directory / INDEX).write_text(content), INDEX, *fragments)


def resize(path: Path, change: int) -> None:
    """Cut bytes off a file, or add zeros."""
    os.truncate(path, path.stat().st_size + change)


def shrink_while_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a byte from a file between its check and its reading."""
    build = load.Llama

    def shrink_and_build(*arguments: object) -> load.Llama:
        resize(path, -1)
        return build(*arguments)

    monkeypatch.setattr(load, "Llama", shrink_and_build)


def replace(path: Path, how: Callable[[Path], object]) -> None:
    """Something else under a file's name."""
    path.unlink()
    how(path)


def link(path: Path, target: str) -> None:
    """A symbolic link under a file's name."""
    replace(path, lambda path: path.symlink_to(target))


def only(directory: Path, *kept: str) -> None:
    """Delete all files but some."""
    for path in directory.iterdir():
        if path.name not in kept:
            path.unlink()


def repeat_name(directory: Path) -> None:
    """The first shard's header twice in one object."""
    header, data = read_file(directory / FIRST)
    write_file(directory / FIRST, header[:-1] + b"," + header[1:], data)


def repeat_index_entry(directory: Path) -> None:
    (directory / INDEX).write_text(f'{{"weight_map": {{"{HEAD}": "{FIRST}", "{HEAD}": "{SECOND}"}}}}')


def widen(path: Path, num_bytes: int) -> None:
    """A file of that size that takes no room on the disk."""
    path.write_bytes(num_bytes.to_bytes(8, "little"))
    os.truncate(path, num_bytes + 8)


def leading_gap(draft: Draft) -> None:
    draft.data[SECOND] = b"\0\0" + draft.data[SECOND]
    for entry in draft.headers[SECOND].values():
        entry["data_offsets"] = [offset + 2 for offset in entry["data_offsets"]]


def both_hold_norm(draft: Draft) -> None:
    draft.add(FIRST, NORM, [8])
    draft.weight_map[NORM] = FIRST


def without_norm(draft: Draft) -> None:
    draft.remove(NORM)
    draft.weight_map[NORM] = SECOND


def unindexed(draft: Draft) -> None:
    draft.add(FIRST, "model.extra.weight", [4])


def indexed(name: str, shape: list[int]) -> Callable[[Draft], None]:
    """A tensor too many, index and all."""
    def spoil(draft: Draft) -> None:
        draft.add(SECOND, name, shape)
        draft.weight_map[name] = SECOND
    return spoil


def end(draft: Draft, tensor: str, change: int) -> None:
    draft.find(tensor)["data_offsets"][1] += change


def begin(draft: Draft, tensor: str, change: int) -> None:
    draft.find(tensor)["data_offsets"][0] += change


FILES = [
    on_disk("an empty shard", lambda d: (d / FIRST).write_bytes(b""), FIRST, "0 bytes long, too short"),
    on_disk("a shard of seven bytes", lambda d: (d / FIRST).write_bytes(b"\2" + bytes(6)), FIRST,
            "7 bytes long, too short"),
    on_disk("a shard cut in its header", lambda d: os.truncate(d / FIRST, 100), FIRST,
            "cannot hold the header"),
    on_disk("a shard without its last byte", lambda d: resize(d / SECOND, -1), SECOND, HEAD, "cut short"),
    on_disk("a shard without half its data", lambda d: resize(d / FIRST, -900), FIRST, "cut short"),
    on_disk("a shard with a byte too many", lambda d: resize(d / SECOND, 1), SECOND, "1 bytes more"),
    on_disk("a header of no length", lambda d: write_file(d / FIRST, b"", b"{}"), FIRST,
            "does not begin with '{'"),
    on_disk("a header of all lengths", lambda d: write_file(d / FIRST, b"{}", header_bytes=2**64 - 1), FIRST,
            f"header is {2**64 - 1} bytes", "100000000"),
    on_disk("a header over the format's limit", lambda d: widen(d / FIRST, 100_000_001), FIRST,
            "header is 100000001 bytes"),
    on_disk("a shard that is a directory", lambda d: replace(d / FIRST, Path.mkdir), FIRST, EMBED,
            "not a regular file"),
    on_disk("a shard that is a pipe", lambda d: replace(d / FIRST, os.mkfifo), FIRST, EMBED,
            "not a regular file"),
    on_disk("a shard that is missing", lambda d: (d / SECOND).unlink(), SECOND, FIRST_OF_SECOND, "is missing",
            INDEX),
    on_disk("a link to nothing", lambda d: link(d / FIRST, "gone"), FIRST, EMBED, "leads nowhere"),
    on_disk("a link to itself", lambda d: link(d / FIRST, FIRST), FIRST, EMBED, "leads nowhere"),
    on_disk("a link out of the directory", lambda d: link(d / FIRST, __file__), FIRST,
            "link out of its directory"),
    on_disk("an index that is a link out", lambda d: link(d / INDEX, __file__), INDEX,
            "link out of its directory"),
    on_disk("a shard that no index names", lambda d: (d / THIRD).write_bytes(b""), THIRD, "is not named in",
            INDEX),
    on_disk("a single file beside the shards", lambda d: (d / SINGLE).write_bytes(b""), f"/{SINGLE}",
            "is not named in", INDEX),
    on_disk("shards without their index", lambda d: (d / INDEX).unlink(), FIRST, "download the index"),
    on_disk("a second file without an index",
            lambda d: ((d / INDEX).unlink(), (d / FIRST).rename(d / SINGLE)), SECOND,
            f"lies beside {SINGLE}"),
    on_disk("a single file that is a directory", lambda d: (only(d, "config.json"), (d / SINGLE).mkdir()),
            f"{SINGLE} is not a regular file"),
    on_disk("a configuration alone", lambda d: only(d, "config.json"), f"neither {SINGLE} nor {INDEX}"),
    pickled("consolidated.00.pth"),
    pickled("pytorch_model.bin"),
    pickled("model.pt"),
    on_disk("an empty directory", only, "neither config.json nor params.json"),
    on_disk("no directory", lambda d: (only(d), d.rmdir()), "does not exist"),
    on_disk("a file for a directory", lambda d: (only(d), d.rmdir(), d.write_bytes(b"")),
            "is not a directory"),
]

HEADERS = [
    with_header("a header that is not UTF-8", b'{"\xff": 1}', "not valid JSON", "utf-8"),
    with_header("a header that is no JSON", b'{"a": ', "not valid JSON"),
    with_header("a header that is a list", b"[]", "does not begin with '{'"),
    with_header("a header that begins with a space", b" {}", "does not begin with '{'"),
    with_header("a header nested too deep", b'{"a":' * 200_000, "not valid JSON", "recursion"),
    with_header("a number without end", b'{"a":' + b"9" * 5000 + b"}", "not valid JSON", "digits"),
    with_header("a header with an endless name", b'{"' + b"a" * 100_000 + b'": 1}', "aaaa...aaaa",
                "data_offsets"),
    with_header("a header with an unprintable name", b'{"\\ud800\\n": 1}', r"'\ud800\n'", "data_offsets"),
    with_header("metadata that is no object", b'{"__metadata__": 3}', "__metadata__"),
    with_header("metadata of numbers", b'{"__metadata__": {"a": 1}}', "__metadata__"),
    with_header("an empty header", b"{}", f"does not hold tensor '{EMBED}'", INDEX),
    on_disk("a name twice in a header", repeat_name, FIRST, "stands there twice"),
    with_header("a tensor twice in a header", b'{"a": {}, "b": {}, "a": {}}', "'a' stands there twice"),
    with_header("a field twice in an entry", b'{"a": {"dtype": "F32", "dtype": "BF16"}}',
                "'dtype' stands there twice"),
    in_header("an entry without a dtype", UP, "must have dtype", dtype=...),
    in_header("an entry without a shape", UP, "must have dtype", shape=...),
    in_header("an entry without offsets", UP, "must have dtype", data_offsets=...),
    in_header("an entry with a field too many", UP, "must have dtype", scale=1),
    Case("an entry that is a number", (SECOND, NORM, "must have dtype"),
         lambda draft: draft.headers[SECOND].update({NORM: 7})),
    *(in_header(f"dtype {dtype!r}", K, repr(dtype), dtype=dtype)
      for dtype in ("F64", "I64", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "bf16", None, ["BF16"])),
    in_header("a negative size", UP, "no list of sizes", shape=[-12, -8]),
    in_header("a fractional size", UP, "no list of sizes", shape=[12.0, 8]),
    in_header("a size that is true", NORM, "no list of sizes", shape=[8, True]),
    in_header("a shape that is text", UP, "no list of sizes", shape="12x8"),
    in_header("a shape without an end", UP, "192 bytes, which is not the size", shape=[2**62] * 5000),
    in_header("a shape that is too large", UP, "192 bytes, which is not the size of BF16 [13, 8]",
              shape=[13, 8]),
    in_header("a shape whose size wraps around to fit", UP, "not the size of", shape=[2**63 + 48, 2]),
    in_header("a shape with nothing in it", UP, "not the size of", shape=[0, 8]),
    in_header("another dtype of another size", UP, "not the size of F32", dtype="F32"),
    in_header("an offset that is negative", EMBED, "no range of bytes", data_offsets=[-256, 0]),
    in_header("an offset that is a fraction", EMBED, "no range of bytes", data_offsets=[0.0, 256]),
    in_header("offsets in reverse", UP, "no range of bytes", data_offsets=[500, 400]),
    in_header("three offsets", UP, "no range of bytes", data_offsets=[0, 1, 2]),
    in_header("an offset beyond the file", K, "has only", data_offsets=[0, 10**15]),
    in_header("an offset beyond all files", K, "has only", data_offsets=[10**400, 10**400]),
    Case("two tensors of the same bytes", (FIRST, UP, "overlaps"),
         lambda draft: draft.find(UP).update(data_offsets=draft.find(GATE)["data_offsets"])),
    Case("a gap between tensors", (SECOND, HEAD, "leaves a gap"),
         lambda draft: draft.headers[SECOND].pop(NORM)),
    Case("a gap before the first tensor", (SECOND, FIRST_OF_SECOND, "leaves a gap"), leading_gap),
    Case("a tensor that is a row short", (FIRST, DOWN, "not the size of"),
         lambda draft: end(draft, DOWN, -24)),
    Case("a tensor that begins a row late", (FIRST, UP, "not the size of"),
         lambda draft: begin(draft, UP, 16)),
]

INDICES = [
    as_index("an index that is no JSON", "{", "not valid JSON"),
    as_index("an empty index", "", "not valid JSON"),
    as_index("an index that is a list", "[]", "must be a JSON object"),
    as_index("an index without a map", '{"metadata": {}}', "weight_map"),
    as_index("an index with an empty map", '{"weight_map": {}}', "weight_map"),
    as_index("an index with a list for a map", '{"weight_map": ["a"]}', "weight_map"),
    on_disk("an index that is a directory", lambda d: replace(d / INDEX, Path.mkdir), INDEX,
            "not a regular file"),
    on_disk("an index over the limit", lambda d: widen(d / INDEX, 100_000_001), INDEX,
            "longer than 100000000"),
    on_disk("a tensor twice in the index", repeat_index_entry, INDEX, f"'{HEAD}' stands there twice"),
    *(in_map(f"a shard named {shard!r}", INDEX, HEAD, "not the name of a safetensors file", head=shard)
      for shard in (f"../{FIRST}", "/etc/passwd", "/dev/zero", f"sub/{FIRST}", f".\\{FIRST}", "..", "",
                    "a\0.safetensors",
                    "C:a.safetensors", "pytorch_model.bin", 3, None, "a" * 5000 + ".safetensors")),
    Case("a tensor that its shard does not hold", (SECOND, NORM, "does not hold"), without_norm),
    in_map("a tensor in the other shard", SECOND, HEAD, f"places in '{FIRST}'", head=FIRST),
    in_map("a tensor that is nowhere", FIRST, "model.ghost.weight", "does not hold",
           **{"model.ghost.weight": FIRST}),
    Case("a tensor that the index does not name", (FIRST, "model.extra.weight", "does not name"), unindexed),
    Case("a tensor in two shards", (FIRST, SECOND, NORM, "two shards"), both_hold_norm),
]

MISMATCHES = [
    on_disk("a configuration that is no JSON", lambda d: (d / "config.json").write_text("{"), "config.json",
            "not valid JSON"),
    on_disk("no configuration", lambda d: (d / "config.json").unlink(), "neither config.json"),
    in_config("another model_type", "config.json", "model_type", "mistral", model_type="mistral"),
    in_config("another hidden_size", FIRST, EMBED, "[16, 8]", "[16, 16]",
              "hidden_size is 16 there and 8 here",
              hidden_size=16),
    in_config("another vocab_size", FIRST, EMBED, "[16, 8]", "[128256, 8]",
              "vocab_size is 128256 there and 16 here",
              vocab_size=128256),
    in_config("another intermediate_size", FIRST, GATE, "[12, 8]", "[28, 8]",
              "intermediate_size is 28 there and 12 here", intermediate_size=28),
    in_config("another number of key heads", FIRST, layer(0, "self_attn.k_proj"), "[4, 8]", "[8, 8]",
              "num_key_value_heads * head_dim is 8 there and 4 here", num_key_value_heads=4),
    in_config("another head_dim", FIRST, layer(0, "self_attn.q_proj"), "[8, 8]", "[16, 8]",
              "num_attention_heads * head_dim is 16 there and 8 here", head_dim=4),
    in_config("sizes beyond any memory", FIRST, EMBED, f"[{10**18}, {10**15}]", vocab_size=10**18,
              hidden_size=10**15, head_dim=2),
    in_config("a layer too many", layer(2, "self_attn.q_proj"), "num_hidden_layers is 3", FIRST, SECOND,
              num_hidden_layers=3),
    in_config("a million million layers", layer(2, "self_attn.q_proj"), "num_hidden_layers is 1000000000000",
              num_hidden_layers=10**12),
    in_config("a layer too few", layer(1, "input_layernorm"), "no part of a Llama", "num_hidden_layers 1",
              num_hidden_layers=1),
    Case("no head", (HEAD, "tie_word_embeddings is false", FIRST, SECOND), lambda draft: draft.remove(HEAD)),
    Case("no final norm", (NORM, "is in none of the files", SECOND), lambda draft: draft.remove(NORM)),
    Case("no q_proj in a layer", (layer(1, "self_attn.q_proj"), "is in none of the files"),
         lambda draft: draft.remove(layer(1, "self_attn.q_proj"))),
    Case("a bias", (SECOND, "model.layers.0.self_attn.q_proj.bias", "no part of a Llama"),
         indexed("model.layers.0.self_attn.q_proj.bias", [8])),
    Case("a scale of quantised weights", (SECOND, UP + "_scale", "no part of a Llama"),
         indexed(UP + "_scale", [12])),
    Case("a tensor of another kind of model", (SECOND, layer(0, "self_attn.q_norm"), "another kind"),
         indexed(layer(0, "self_attn.q_norm"), [2])),
    in_header("a matrix that is transposed", DOWN, "[12, 8], but the configuration asks for [8, 12]",
              shape=[12, 8]),
    in_header("a matrix that is a vector", DOWN, "has shape [96]; a Llama's is [8, 12]", shape=[96]),
    in_header("a norm that is a matrix", NORM, "has shape [1, 8]; a Llama's is [8]", shape=[1, 8]),
]

CASES = FILES + HEADERS + INDICES + MISMATCHES
