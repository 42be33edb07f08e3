"""Checkpoint folders: safetensors headers, the index, configs, tokenizer files and the manifest."""
