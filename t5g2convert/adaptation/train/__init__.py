"""A training run: loop, loss, distributed engine, checkpoints, metrics."""
