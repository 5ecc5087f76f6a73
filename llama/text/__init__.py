"""Characters to token ids and back: tokenizer, chat template, streaming decode. Never imports torch."""
