"""The output folder: whether it may be written, whose files it holds, its staging folder, recovery after a kill."""
