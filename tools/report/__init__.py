"""The page of ``dspark-tools report`` and the view of ``watch``: both read files, never weights."""
