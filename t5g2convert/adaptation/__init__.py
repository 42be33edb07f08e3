"""Continued pretraining of a converted model: UL2 data, training on an existing engine, averaging, export."""
