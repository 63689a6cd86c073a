"""A store's files: layout, shards, parts, the index, and how each is committed."""
