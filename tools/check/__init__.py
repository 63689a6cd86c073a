"""``dspark-tools check``: serving mistakes by name, then blocks against real vLLM."""
