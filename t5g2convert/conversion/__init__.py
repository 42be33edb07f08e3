"""The conversion: plan (pure data), writer (bytes), assets (config and files next to the weights), manifest."""
