"""A draft on disk: its folder, and config.json as we and other projects spell it."""
