"""Settings of bits by name. This table is the only place that says them: flags, help, plans and the bench read it.

``bench/codec.py`` measures them: tau of drafts trained on each, against drafts trained on exact states (docs/log.md). No imports, so that
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


def choose_bits(name: str, aux: int | None, last: int | None) -> tuple[int, int]:
    """Bits of setting ``name``, where ``aux`` and ``last`` do not say otherwise."""
    bits = NAMED[name]
    return bits[0] if aux is None else aux, bits[1] if last is None else last
