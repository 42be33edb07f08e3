"""Execute a plan: copy bytes, compute a few tensors, stage, rename."""
