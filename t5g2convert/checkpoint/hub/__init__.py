"""Models of the Hub, read like folders."""
