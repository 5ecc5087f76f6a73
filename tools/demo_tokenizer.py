"""The demo model's tokenizer: byte-level BPE with Llama 3's pre-tokenizer and special tokens.

Three things make copying easy for a small model, and are all that differs but the size: digits stand alone,
no merge joins a word to what is before it, and only whole words of the corpus have a second token with their
space (reached through `ignore_merges`). So a name that the corpus never had is spelled the same everywhere.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tools.demo_format import Piece

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
NUM_PLAIN = 1024  # tokens of text; the 256 special ones follow
NUM_SPACED_WORDS = 160
SPECIAL_TOKENS = (
    ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
     "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
     "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    + [f"<|reserved_special_token_{number}|>" for number in range(3, 248)])


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A tokenizer with NUM_PLAIN + 256 ids from texts without special tokens in them."""
    llama3 = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence([
        llama3, pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}](?=\p{L})|\p{N}"), "isolated"), bytes_only])
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=NUM_PLAIN - NUM_SPACED_WORDS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    vocabulary: dict[str, int] = learned["vocab"]
    spaced = _spaced_words(texts, pre_tokenizers.Sequence([llama3, bytes_only]))
    for word in spaced[:NUM_PLAIN - len(vocabulary)]:
        vocabulary[word] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(pair) for pair in learned["merges"]],
                                     ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([llama3, bytes_only])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    begin = SPECIAL_TOKENS[0]
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1",
                                      special_tokens=[(begin, tokenizer.token_to_id(begin))])])
    return tokenizer


def _spaced_words(texts: Iterable[str], splitter: pre_tokenizers.PreTokenizer) -> list[str]:
    """Words with the space before them, the commonest first."""
    counts = Counter(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text)
                     if piece.startswith("Ġ") and piece[1:].isalpha() and piece[1:].isascii())
    return [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def encode_pieces(tokenizer: Tokenizer,
                  examples: Sequence[Sequence[Piece]]) -> list[tuple[list[int], list[bool]]]:
    """Ids of each example, and which of them the model is to produce."""
    flat = [piece.text for pieces in examples for piece in pieces]
    encodings = iter(tokenizer.encode_batch_fast(flat, add_special_tokens=False))
    encoded = []
    for pieces in examples:
        ids, learned = [], []
        for piece in pieces:
            part = next(encodings).ids
            ids += part
            learned += [piece.learned] * len(part)
        encoded.append((ids, learned))
    return encoded
