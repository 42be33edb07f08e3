"""Models on the Hub, read like folders."""
