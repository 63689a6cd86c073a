"""``dspark-tools import``: stores from other projects' caches."""
