"""Where a store's bytes are: folders and object stores, names, locks, and how each is committed."""
