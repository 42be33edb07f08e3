"""The output folder: checks of its path, ownership of its files, the staging folder, and recovery after a kill."""
