"""Settings of bits by name, and the ways to keep codes. These tables are the only place that says them: flags, help, plans and the bench read them.

``bench/codec.py`` measures them: tau of drafts trained on each, against drafts trained on exact states (docs/log/2026-11-22-bits-against-tau.md). No imports, so that
``--help`` is instant.
"""

from __future__ import annotations

# Name -> bits a value of (aux, last).
NAMED = {
    "default": (4, 4),
    "small": (3, 4),
    "smallest": (2, 4),
    "lossless": (16, 16),
}
NAMES = ", ".join(f"{name} = {aux}/{last}" for name, (aux, last) in NAMED.items())

# How an array of codes is kept: ``zstd`` takes out what the cells' unequal shares leave over; ``none`` keeps the codes as they are, under a checksum:
# a fifth more bytes at 4 bits, a size that is known exactly, and reading at about half the speed of a copy from memory (docs/log/2026-11-22-read-at-memory-speed.md). 3 and 2 bits need zstd.
PACKINGS = ("zstd", "none")
DEFAULT_PACKING = PACKINGS[0]


def choose_bits(name: str, aux: int | None, last: int | None) -> tuple[int, int]:
    """Bits of setting ``name``, where ``aux`` and ``last`` do not say otherwise."""
    bits = NAMED[name]
    return bits[0] if aux is None else aux, bits[1] if last is None else last
