"""The target's frozen weights and its own files, kept in the store."""
