"""Writing a planned output: shards, the other files, and the staging folder."""
