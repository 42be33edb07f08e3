"""Generation: prompts, sampling, batches and streaming, with the reference pass or with transformers."""
