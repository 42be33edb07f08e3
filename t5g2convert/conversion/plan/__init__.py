"""The plan of a conversion, which is pure data, and the modules that build it."""
