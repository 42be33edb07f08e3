"""The plan of a conversion: pure data, and what builds it."""
