"""``--regenerate``: the target answers the prompts, and its states come from the same pass."""
