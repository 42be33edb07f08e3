"""Tokenizer files: the ids they use, special ids, chat templates."""
