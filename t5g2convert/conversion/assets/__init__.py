"""The files besides the weights: config, generation config, tokenizer, processor."""
