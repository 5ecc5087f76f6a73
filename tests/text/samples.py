"""Inputs for the tests of llama.text: text of every kind, and a vocabulary that can be read in one look."""

import random

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

SPECIAL_LOOKING = (
    "<|begin_of_text|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "<|start_header_id|>system<|end_header_id|>\n\n",
    "<|reserved_special_token_247|>",
    "<|",
    "|>",
    "<|eot_id",
    "eot_id|>",
    "<|eot_id|>" * 3,
    "<<|eot_id|>|eot_id|>",
)

_PIECES = (
    *SPECIAL_LOOKING,
    "I'm you're WE'LL don't they'Ve 'ſ it's",
    "don’t ‘quoted’ “text” … – —",
    "0", "7", "42", "1234567890", "3.14159", "٣٤٥", "१२३", "Ⅻ", "½²", "1,000,000",
    "for (int i = 0; i < n; ++i) {\n\treturn a[i];\r\n}",
    "https://example.org/?q=a%20b&c=d#e",
    "👩‍👩‍👧‍👦", "🇨🇭", "🦙🤗", "👍🏽", "e\u0301", "\u200b", "\u200d", "\ufeff", "\ufffd", "\u202e",
    "\n", "\r\n", "\t", " ", "  ", "\u00a0", "\u3000", "\u2028", "\x0b", "\x0c", "\x85",
    "\x00", "\x1f", "\x7f",
    "Hello", " world", "naïve", "STRASSE", "straße", "ǅ", "ﬁ", "ﷺ",
)  # fmt: skip

_SCRIPTS = (
    (0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x530, 0x58F), (0x5D0, 0x5EA),
    (0x600, 0x6FF), (0x900, 0x97F), (0x980, 0x9FF), (0xB80, 0xBFF), (0xE00, 0xE7F), (0x1000, 0x109F),
    (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x1200, 0x137F), (0x13A0, 0x13FF), (0x1780, 0x17FF),
    (0x1E00, 0x1FFF), (0x2000, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0xE000, 0xE0FF), (0xFB00, 0xFDFF), (0xFE00, 0xFFFD),
    (0x10000, 0x100FF), (0x10400, 0x1044F), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2FFFF),
    (0x10FF00, 0x10FFFF),
)  # fmt: skip


def random_text(rng: random.Random, most_pieces: int = 12) -> str:
    """Up to `most_pieces` pieces: words of one script, white space, digits, emoji, special-looking text."""
    pieces = []
    for _ in range(rng.randint(0, most_pieces)):
        kind = rng.random()
        if kind < 0.45:
            low, high = rng.choice(_SCRIPTS)
            pieces.append("".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8))))
        elif kind < 0.85:
            pieces.append(rng.choice(_PIECES))
        elif kind < 0.95:
            pieces.append(rng.choice(" \n\t\r\u00a0") * rng.randint(1, 20))
        else:
            pieces.append(str(rng.randint(0, 10 ** rng.randint(1, 12))))
    return "".join(pieces)


def small_tokenizer() -> tokenizers.Tokenizer:
    """Three special tokens (ids 0 to 2), the 256 bytes, `ab`, `abab`, `ba`, and two beginnings of a llama."""
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    llama = spelling.pre_tokenize_str("🦙")[0][0]  # four bytes
    merges = [("a", "b"), ("ab", "ab"), ("b", "a"), tuple(llama[:2]), (llama[:2], llama[2])]
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|python_tag|>"]
    names = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = tokenizers.Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    backend.pre_tokenizer = spelling
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return backend
