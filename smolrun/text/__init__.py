"""Text <-> ids: the tokenizer and the chat template."""
