"""A Triton backend without a compiler, so that the interpreter can be used where there is no GPU (see README.md)."""
