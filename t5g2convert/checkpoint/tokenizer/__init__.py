"""Tokenizer files: the ids in use, special ids, chat templates."""
