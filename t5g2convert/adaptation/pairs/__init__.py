"""Fine-tuning on pairs of an input and a target."""
