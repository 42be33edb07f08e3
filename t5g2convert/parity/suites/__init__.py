"""The checks for each kind of folder, in order."""
