"""Words of which chats are made that need no meaning. Imports nothing: `make wheel` runs on a bare
Python.
"""

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "the",
    "mat",
    "and",
    "says",
    "hello",
    "one",
    "two",
    "three",
    "to",
    "a",
    "user",
]
