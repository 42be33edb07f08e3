"""Writing what a plan describes: shards, computed tensors and the small files, copied, hashed and resumed."""
