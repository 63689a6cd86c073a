"""The page of ``dspark-tools report`` and the view of ``watch``: they read files, never weights,
and draw.
"""
