"""The execution of a plan: writing shards, computed tensors and the small files, with hashing and resume."""
