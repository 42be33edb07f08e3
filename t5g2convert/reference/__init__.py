"""Gemma 3 and T5Gemma 2 in plain torch, computed one layer at a time from safetensors files.

These models judge a conversion, so this package does not import the converter or weight maps. Attribute names are
checkpoint keys. Tensors carry their shape as a suffix: B batch, T queries (decoder or encoder tokens), S keys, M memory
tokens (the encoder's output), C hidden width, H query heads, K key-value heads, G query heads per key-value head,
D head width, V vocabulary, P image patches.
"""
