"""A Triton backend without a compiler: the interpreter, where there is no GPU (see README.md)."""
