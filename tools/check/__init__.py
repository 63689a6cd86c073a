"""``dspark-tools check``: known serving mistakes, then drafted blocks compared with real vLLM."""
