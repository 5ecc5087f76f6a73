"""Text to token ids and back, by byte-level BPE.

A token is a byte string; ids follow the tokens' ranks. The `tokenizers` library does the merging; this file
says where a vocabulary is read from, keeps text from becoming control tokens, and gives exact bytes back.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors

BEGIN_OF_TEXT = "<|begin_of_text|>"

# Llama 3's pre-tokenizer: BPE merges only within one match of this expression.
PRE_TOKENIZER_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The 256 special tokens of Llama 3.1 in id order; the first id is the number of ordinary tokens.
SPECIAL_TOKENS = (
    BEGIN_OF_TEXT,
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248)),
)


def _byte_alphabet() -> str:
    """The 256 characters by which byte-level vocabularies write the bytes 0 to 255 (GPT-2's table).

    A byte that is a printable Latin-1 character stands for itself; the others follow, in order, from U+0100.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return "".join(chr(byte if byte in printable else 0x100 + others.index(byte)) for byte in range(256))


_SPELLING_OF_BYTE = MappingProxyType(dict(enumerate(_byte_alphabet())))
_BYTE_OF_SPELLING = MappingProxyType({ord(char): byte for byte, char in enumerate(_byte_alphabet())})


class TokenizerError(ValueError):
    """A tokenizer file that cannot be used, or a token that the vocabulary does not have."""


class Tokenizer:
    """Encodes text to ids and decodes ids to text.

    `vocab_size` is the number of ids, special tokens included; `special_tokens` maps the special tokens'
    names to their ids. Instances may be shared between threads.
    """

    def __init__(self, backend: tokenizers.Tokenizer, bos_token: str = BEGIN_OF_TEXT):
        """Takes over a byte-level BPE `backend`. Raises TokenizerError where it is of another kind."""
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise TokenizerError("the tokenizer is not byte-level BPE: its decoder must be ByteLevel")
        # Files saved by training scripts carry these settings, which would shorten prompts silently.
        backend.no_truncation()
        backend.no_padding()
        # Despite its name: with it, the names of special tokens in a text are encoded as the text they are.
        backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._bos_token = bos_token
        self._added_names = {token_id: token.content for token_id, token in added.items()}
        self.vocab_size: int = backend.get_vocab_size()
        self.special_tokens: Mapping[str, int] = MappingProxyType(
            {token.content: token_id for token_id, token in sorted(added.items()) if token.special}
        )
        self._special_ids = frozenset(self.special_tokens.values())

    @classmethod
    def from_directory(cls, directory: str | Path) -> "Tokenizer":
        """Reads a checkpoint's tokenizer.json, or else its tokenizer.model (also in original/).

        Raises TokenizerError where there is none of them, or where it cannot be used.
        """
        directory = Path(directory)
        json_file = directory / "tokenizer.json"
        if json_file.is_file():
            bos_token = token_name(read_tokenizer_config(directory), "bos_token", BEGIN_OF_TEXT)
            try:
                return cls(tokenizers.Tokenizer.from_file(str(json_file)), bos_token)
            except Exception as error:  # the library raises plain Exception
                raise TokenizerError(f"{json_file}: {error}") from error
        for model_file in (directory / "tokenizer.model", directory / "original" / "tokenizer.model"):
            if model_file.is_file():
                return cls.from_tiktoken_file(model_file)
        raise TokenizerError(f"{directory} has neither tokenizer.json nor tokenizer.model; put one there")

    @classmethod
    def from_tiktoken_file(cls, path: str | Path) -> "Tokenizer":
        """Builds the Llama 3.1 tokenizer from Meta's tokenizer.model: lines of `base64-token rank`.

        The ids are those of the published tokenizer.json. Raises TokenizerError, naming the line.
        """
        ranks = _read_ranks(Path(path))
        spelling = {token: _spell(token) for token in ranks}
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab={spelling[token]: rank for token, rank in ranks.items()},
                merges=[(spelling[left], spelling[right]) for left, right in _merges(ranks)],
                ignore_merges=True,
            )
        )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PRE_TOKENIZER_REGEX), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL_TOKENS])
        # Not used here: for other readers of a saved tokenizer.json, which is then the published one.
        backend.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(
                    single=f"{BEGIN_OF_TEXT} $A",
                    pair=f"{BEGIN_OF_TEXT} $A {BEGIN_OF_TEXT}:1 $B:1",
                    special_tokens=[(BEGIN_OF_TEXT, len(ranks))],
                ),
            ]
        )
        return cls(backend)

    @property
    def bos_token_id(self) -> int:
        """The id that begins every sequence. Raises TokenizerError where the vocabulary has none."""
        return self.token_id(self._bos_token)

    def token_id(self, name: str) -> int:
        """The id of a special token, such as `<|eot_id|>`. Raises TokenizerError where there is none."""
        try:
            return self.special_tokens[name]
        except KeyError:
            raise TokenizerError(f"the tokenizer has no special token {name}") from None

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a special token's."""
        return token_id in self._special_ids

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """The ids of `text`, after the begin-of-text id if `bos`.

        Text is text: `<|eot_id|>` in it becomes several ordinary ids. A lone surrogate is encoded as U+FFFD.
        """
        # The file's post-processor would add a second begin-of-text: it is never asked to.
        # A batch of one, because only batches let other threads run meanwhile, which long texts take long for.
        [encoding] = self._backend.encode_batch_fast([valid_text(text)], add_special_tokens=False)
        ids = encoding.ids
        if not self._special_ids.isdisjoint(ids):
            names = [name for name, token_id in self.special_tokens.items() if token_id in ids]
            raise TokenizerError(f"this vocabulary makes the special token {names[0]} out of plain text")
        return [self.bos_token_id, *ids] if bos else ids

    def encode_prompt(self, segments: Iterable[str | int]) -> list[int]:
        """The ids of a prompt given in segments: a string is text, and stays text; an integer is an id.

        Each string is encoded by itself, as text between control tokens is.
        """
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, str):
                ids += self.encode(segment)
            else:
                ids.append(segment)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; what is not UTF-8 becomes U+FFFD. Raises TokenizerError on an unknown id."""
        kept = (i for i in ids if not (skip_special_tokens and self.is_special(i)))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of an id (a special token's: its name). Raises TokenizerError on unknown ids."""
        if token_id in self._added_names:
            return self._added_names[token_id].encode()
        try:
            token = self._backend.id_to_token(token_id)
        except OverflowError:  # negative, or past 32 bits
            token = None
        if token is None:
            raise TokenizerError(f"token id {token_id} is not in the vocabulary of {self.vocab_size} ids")
        return token.translate(_BYTE_OF_SPELLING).encode("latin-1")

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json into `directory`."""
        text = self._backend.to_str(pretty=True)
        (Path(directory) / "tokenizer.json").write_text(text, encoding="utf-8")


def valid_text(text: str) -> str:
    """The text with surrogate pairs joined, and U+FFFD for lone surrogates, which UTF-8 cannot write."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def read_tokenizer_config(directory: Path) -> dict:
    """The object in tokenizer_config.json, empty where there is no such file. Raises TokenizerError."""
    file = directory / "tokenizer_config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{file} must hold a JSON object")
    return config


def token_name(config: dict, key: str, default: str) -> str:
    """A token's name out of tokenizer_config.json, where it is a string or an object with `content`."""
    value = config.get(key)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else default


def _spell(token: bytes) -> str:
    return token.decode("latin-1").translate(_SPELLING_OF_BYTE)


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            message = f"{path}, line {number}: not `base64-token rank`, so this is no tiktoken file"
            raise TokenizerError(message) from error
    if list(ranks.values()) != list(range(len(ranks))):
        raise TokenizerError(f"{path}: the ranks must be 0, 1, 2, ..., each token once")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{path}: the byte {missing[0]:#04x} has no token; the file is incomplete")
    return ranks


def _merges(ranks: Mapping[bytes, int]) -> Iterable[tuple[bytes, bytes]]:
    """Every way to join two tokens into a third, in the order in which BPE may use them.

    tiktoken joins the neighbours whose union has the lowest rank; the tokenizers library takes the first pair
    on a list. With the pairs of one union side by side, unions by rank, the two choose alike.
    """
    for token in ranks:
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in splits if left in ranks and right in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
