"""Model families: read config.json into a typed config, and list the tensors that it implies."""
