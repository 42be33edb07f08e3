"""What lies on disk: safetensors headers, the index, and the config dialects of both model families."""
