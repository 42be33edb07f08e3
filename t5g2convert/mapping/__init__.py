"""Weight maps: the YAML schema, its strict loader, and what a map says of one model."""
