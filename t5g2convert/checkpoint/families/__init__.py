"""Model families: config.json in, a typed config and the tensors it implies out."""
