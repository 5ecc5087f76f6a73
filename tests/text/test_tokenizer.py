"""llama.text.tokenizer against Meta's tokenizer, the published file, and FACTS.md's vectors."""

import base64
import hashlib
import json
import random
import subprocess
import sys
import unicodedata

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from llama.text.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerError
from tests.oracles import meta_tokenizer_file
from tests.text.samples import SPECIAL_LOOKING, random_text, small_tokenizer

VECTORS = {
    "Hello, world!": [9906, 11, 1917, 0],
    "1234567890 3.14159": [4513, 10961, 16474, 15, 220, 18, 13, 9335, 2946],
    "🤗🦙 emoji": [9468, 97, 245, 9468, 99, 247, 43465],
    "I'm you're WE'LL don't": [40, 2846, 499, 2351, 20255, 6, 4178, 1541, 956],
    "This is a test sentence.": [2028, 374, 264, 1296, 11914, 13],
}

SPECIAL_IDS = {
    "<|begin_of_text|>": 128000,
    "<|end_of_text|>": 128001,
    "<|reserved_special_token_0|>": 128002,
    "<|reserved_special_token_1|>": 128003,
    "<|finetune_right_pad_id|>": 128004,
    "<|reserved_special_token_2|>": 128005,
    "<|start_header_id|>": 128006,
    "<|end_header_id|>": 128007,
    "<|eom_id|>": 128008,
    "<|eot_id|>": 128009,
    "<|python_tag|>": 128010,
    "<|reserved_special_token_3|>": 128011,
    "<|reserved_special_token_247|>": 128255,
}


@pytest.mark.parametrize("text", VECTORS)
def test_published_vectors(tokenizer, text):
    assert tokenizer.encode(text) == VECTORS[text]
    assert tokenizer.decode(VECTORS[text]) == text


def test_special_tokens_have_the_published_ids(tokenizer):
    assert tokenizer.vocab_size == 128256
    assert list(tokenizer.special_tokens.values()) == list(range(128000, 128256))
    assert {name: tokenizer.token_id(name) for name in SPECIAL_IDS} == SPECIAL_IDS
    assert tokenizer.is_special(128000)
    assert not tokenizer.is_special(127999)


def test_built_from_tokenizer_model_it_is_the_published_tokenizer_json(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert len(saved["model"]["merges"]) == 280_147
    # The file was published when the library still wrote a merge as one string.
    saved["model"]["merges"] = [" ".join(pair) for pair in saved["model"]["merges"]]
    published = json.dumps(saved, ensure_ascii=False, indent=2).encode()
    assert len(published) == 9_085_657
    assert hashlib.sha256(published).hexdigest().startswith("79e3e522")


def test_agrees_with_tiktoken_on_generated_strings(tokenizer, meta):
    rng = random.Random(20240726)
    for _ in range(6000):
        text = random_text(rng)
        ids = tokenizer.encode(text)
        assert ids == meta.encode(text, bos=False, eos=False), repr(text)
        assert tokenizer.decode(ids) == text


def test_agrees_with_tiktoken_on_every_character(tokenizer, meta):
    characters = (chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    assigned = [c for c in characters if unicodedata.category(c) not in ("Cn", "Co")]
    assert len(assigned) > 140_000
    for character in assigned:
        text = f"a{character} 1{character}{character}\n'{character}"
        assert tokenizer.encode(text) == meta.encode(text, bos=False, eos=False), repr(text)


def test_special_looking_text_is_text(tokenizer, meta):
    for name in (*SPECIAL_TOKENS, *SPECIAL_LOOKING):
        for text in (name, f"say {name} now", name * 2):
            ids = tokenizer.encode(text)
            assert max(ids) < 128000
            assert ids == meta.encode(text, bos=False, eos=False)
            assert tokenizer.decode(ids) == text


def test_bos_is_added_once_and_only_when_asked(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    published = Tokenizer.from_directory(tmp_path)  # whose post-processor adds one
    for each in (tokenizer, published):
        assert each.encode("Hello") == [9906]
        assert each.encode("Hello", bos=True) == [128000, 9906]
        assert each.encode("", bos=True) == [128000]


def test_encode_prompt_takes_control_tokens_as_ids_and_text_as_text(tokenizer, meta):
    eot = tokenizer.token_id("<|eot_id|>")
    ids = tokenizer.encode_prompt([tokenizer.bos_token_id, "Hi <|eot_id|>", eot])
    assert ids == [128000, *meta.encode("Hi <|eot_id|>", bos=False, eos=False), 128009]


def test_lone_surrogates_are_encoded_as_tiktoken_does(tokenizer, meta):
    for text in ("a\ud800b", "\udfff", "\ud83e\udd99", "🦙\ud83e"):
        assert tokenizer.encode(text) == meta.encode(text, bos=False, eos=False)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"


def test_bytes_of_every_token(tokenizer, meta):
    for token_id in range(128000):
        assert tokenizer.token_bytes(token_id) == meta.model.decode_single_token_bytes(token_id)
    assert tokenizer.token_bytes(128009) == b"<|eot_id|>"


def test_decode_of_random_ids_agrees_with_tiktoken(tokenizer, meta):
    rng = random.Random(8)
    for _ in range(500):
        ids = [rng.randrange(128000) for _ in range(rng.randint(0, 30))]
        assert tokenizer.decode(ids) == meta.decode(ids)


def test_decode_drops_special_tokens_only_when_asked(tokenizer):
    ids = [128000, 9906, 128009]
    assert tokenizer.decode(ids) == "Hello"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|begin_of_text|>Hello<|eot_id|>"
    # Two bytes of a llama, then a special token, then the rest: characters go by bytes alone.
    llama = tokenizer.encode("🦙")
    assert tokenizer.decode([llama[0], 128009, *llama[1:]]) == "🦙"
    assert tokenizer.decode(llama[:1]) == "\ufffd"


@pytest.mark.parametrize("token_id", [128256, -1, 2**40])
def test_an_unknown_id_is_an_error_that_names_it(tokenizer, token_id):
    with pytest.raises(TokenizerError, match=f"token id {token_id} is not in the vocabulary of 128256 ids"):
        tokenizer.decode([9906, token_id])


def test_an_unknown_special_token_is_an_error_that_names_it(tokenizer):
    with pytest.raises(TokenizerError, match="no special token <|image|>".replace("|", r"\|")):
        tokenizer.token_id("<|image|>")


def test_a_directory_gives_tokenizer_json_then_tokenizer_model_then_original(tokenizer, small, tmp_path):
    with pytest.raises(TokenizerError, match=f"{tmp_path} has neither tokenizer.json nor tokenizer.model"):
        Tokenizer.from_directory(tmp_path)
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.model").write_bytes(meta_tokenizer_file().read_bytes())
    assert Tokenizer.from_directory(tmp_path).special_tokens == tokenizer.special_tokens
    _write_model(tmp_path, [bytes([i]) for i in range(256)])
    assert Tokenizer.from_directory(tmp_path).vocab_size == 512
    small.save(tmp_path)
    assert Tokenizer.from_directory(tmp_path).vocab_size == small.vocab_size


def test_special_tokens_at_other_ids_are_read_by_name(small, tmp_path):
    small.save(tmp_path)
    loaded = Tokenizer.from_directory(tmp_path)
    assert dict(loaded.special_tokens) == {"<|begin_of_text|>": 0, "<|eot_id|>": 1, "<|python_tag|>": 2}
    assert loaded.bos_token_id == 0
    assert loaded.encode("ab<|eot_id|>", bos=True) == small.encode("ab<|eot_id|>", bos=True)
    assert not {0, 1, 2} & set(loaded.encode("ab<|eot_id|>"))
    assert loaded.decode(loaded.encode("ab<|eot_id|>")) == "ab<|eot_id|>"


def test_added_tokens_that_are_not_special_are_text(tmp_path):
    backend = small_tokenizer()
    backend.add_tokens([AddedToken("<é>", normalized=False)])
    tokenizer = Tokenizer(backend)
    (token_id,) = tokenizer.encode("<é>")
    assert "<é>" not in tokenizer.special_tokens
    assert tokenizer.token_bytes(token_id) == "<é>".encode()
    assert tokenizer.decode([token_id]) == "<é>"


def test_the_name_of_bos_is_read_from_tokenizer_config(small, tmp_path):
    small.save(tmp_path)
    for value in ("<|python_tag|>", {"content": "<|python_tag|>", "special": True}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": value}))
        assert Tokenizer.from_directory(tmp_path).encode("a", bos=True)[0] == 2


def test_truncation_and_padding_in_the_file_are_not_obeyed(tmp_path):
    backend = small_tokenizer()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert len(tokenizer.encode("cdefgh")) == 6
    assert len(tokenizer.encode("c")) == 1


def test_a_vocabulary_that_makes_a_control_token_of_plain_text_is_refused_there():
    backend = small_tokenizer()
    spelled = tokenizers.Tokenizer(models.BPE(vocab=backend.get_vocab(), merges=[("a", "b")]))
    spelled.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled.decoder = decoders.ByteLevel()
    spelled.add_special_tokens(["ab"])
    tokenizer = Tokenizer(spelled)
    assert tokenizer.decode(tokenizer.encode("b a")) == "b a"
    with pytest.raises(TokenizerError, match="makes the special token ab out of plain text"):
        tokenizer.encode("ab")


def test_other_kinds_of_tokenizer_are_refused(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoders.Metaspace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="tokenizer.json: the tokenizer is not byte-level BPE"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"model": ', "[1]"])
def test_a_damaged_tokenizer_json_is_named(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(TokenizerError, match=str(tmp_path / "tokenizer.json")):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_tokenizer_config_is_named(small, tmp_path, content):
    small.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(TokenizerError, match=str(tmp_path / "tokenizer_config.json")):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [b"\x0a\x0e\x0a\x05<unk>", *lines], "line 1: not `base64-token rank`"),
        (lambda lines: [*lines, b"!!!! 256"], "line 257: not `base64-token rank`"),
        (lambda lines: [*lines, b"YWI= x"], "line 257: not `base64-token rank`"),
        (lambda lines: [*lines, b"YWI="], "line 257: not `base64-token rank`"),
        (lambda lines: [*lines, b"YWI= 300"], "ranks must be 0, 1, 2"),
        (lambda lines: [*lines, lines[0].split()[0] + b" 256"], "ranks must be 0, 1, 2"),
        (lambda lines: lines[:-1], "the byte 0xff has no token"),
        (lambda lines: [], "the byte 0x00 has no token"),
    ],
)
def test_a_damaged_tokenizer_model_is_named(tmp_path, damage, message):
    file = _write_model(tmp_path, [bytes([i]) for i in range(256)])
    file.write_bytes(b"\n".join(damage(file.read_bytes().splitlines())))
    with pytest.raises(TokenizerError, match=f"{file}.*{message}"):
        Tokenizer.from_tiktoken_file(file)


def test_the_text_layer_does_not_import_torch():
    code = "import sys, llama.text.chat, llama.text.stream; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def _write_model(directory, tokens):
    file = directory / "tokenizer.model"
    file.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)))
    return file
