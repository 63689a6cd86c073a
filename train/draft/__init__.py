"""The draft: config, network, heads, and drafter types."""
