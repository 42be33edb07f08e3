"""Weight maps: the YAML schema, its strict loader, and the application of a map to a model."""
