"""The draft: config, network, heads, and the folder it is saved in."""
