"""Which checks judge which kind of folder, in order."""
