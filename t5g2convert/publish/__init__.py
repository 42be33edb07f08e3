"""Publishing: what a folder tells of itself to people, and how it gets to the Hub."""
