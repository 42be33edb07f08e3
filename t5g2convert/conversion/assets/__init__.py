"""The auxiliary files: config, tokenizer, processor."""
