"""The conversion: plan (pure data), writer (bytes), assets (config and files beside the weights), manifest."""
