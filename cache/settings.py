"""Short names of codecs, and the ways to pack codes. These tables are the only source: flags, help,
plans and benchmarks read them.

Short names stand for quality: tau of drafts trained on each, against drafts trained on exact states
(docs/log/2026-11-26-klt-coarse-prompts.md). Almost no imports, so that ``--help`` is instant.
"""

from __future__ import annotations

import re

from dspark.cache.errors import UsageError

LOSSLESS = "lossless"
# Short name -> the codec's full name, which is what a store records. Measured change of tau from
# real stores: -0.35 +- 0.26 % (16.5 times smaller), -0.50 +- 0.36 (21.1), -1.30 +- 0.38 (25.3);
# with one step for all tokens -0.9 +- 0.3 (klt-1-1, 16.5), -1.7 +- 0.3 (0.6-1, 25.5).
NAMED = {
    "default": "klt-1-1-2",
    "small": "klt-0.75-1-2",
    "smallest": "klt-0.6-1-2",
    LOSSLESS: LOSSLESS,
}
FALLBACK = "rotated-4-4"  # if no codec was requested and the default is not possible
NAMES = ", ".join(f"{name} = {full}" for name, full in NAMED.items() if name != full)

# How an array of codes is kept: ``zstd`` removes the redundancy of unequally likely cells; ``none``
# stores the codes uncompressed, with a checksum: a fifth more bytes at 4 bits, a size that is known
# exactly, and reading at about half the speed of a memory copy
# (docs/log/2026-11-22-read-at-memory-speed.md). 3 and 2 bits need zstd.
PACKINGS = ("zstd", "none")
DEFAULT_PACKING = PACKINGS[0]


def rotated_name(aux: int, last: int) -> str:
    """Return the full name of the codec with so many bits per value of the aux layers and of the
    last state.
    """
    return LOSSLESS if (aux, last) == (16, 16) else f"rotated-{aux}-{last}"


def rotated_bits(name: str) -> tuple[int, int] | None:
    """Return the bits in such a name; None for the name of another codec."""
    if name == LOSSLESS:
        return 16, 16
    found = re.fullmatch(r"rotated-([0-9]+)-([0-9]+)", name)
    return (int(found[1]), int(found[2])) if found else None


def klt_name(aux: float, last: float, coarse: float = 1) -> str:
    """Return the full name of the transform codec with these numbers (``codec.klt``)."""
    return f"klt-{aux:g}-{last:g}" + ("" if coarse == 1 else f"-{coarse:g}")


def klt_numbers(name: str) -> tuple[float, float, float] | None:
    """Return the numbers in such a name, whatever they are; None for the name of another codec."""
    number = r"([0-9]+(?:\.[0-9]+)?)"
    found = re.fullmatch(f"klt-{number}-{number}(?:-{number})?", name)
    return (float(found[1]), float(found[2]), float(found[3] or 1)) if found else None


def full_name(name: str) -> str:
    """Return the one full name of codec ``name``, which may be a short name or have its numbers
    written in another way (``klt-1.0-1``, ``rotated-16-16``). A name of no codec is unchanged.
    """
    full = NAMED.get(name, name)
    if bits := rotated_bits(full):
        return rotated_name(*bits)
    numbers = klt_numbers(full)
    return klt_name(*numbers) if numbers else full


def is_asked(name: str | None, aux: int | None = None, last: int | None = None) -> bool:
    """Tell whether a codec was requested, by name or by bits, so that no other may replace it."""
    return name not in (None, "default") or aux is not None or last is not None


def choose_codec(
    name: str | None, aux: int | None, last: int | None, pack: str = DEFAULT_PACKING
) -> str:
    """Return the full name of codec ``name`` (None = the default), unless the bits ``aux`` and
    ``last`` select a rotated one. The default is ``FALLBACK`` if codes are to be stored
    uncompressed, which the transform codec cannot do.
    """
    full = full_name("default" if name is None else name)
    if aux is None and last is None:
        return full if pack == DEFAULT_PACKING or is_asked(name) else FALLBACK
    bits = rotated_bits(full)
    if bits is None:
        refuse_two_names(None if name == "default" else name, aux, last)
    bits = bits or (4, 4)
    return rotated_name(bits[0] if aux is None else aux, bits[1] if last is None else last)


def refuse_two_names(name: str | None, aux: int | None, last: int | None) -> None:
    """Raise UsageError if a codec was requested by ``name`` and by the bits of a rotated one."""
    if name is not None and (aux is not None or last is not None):
        raise UsageError(
            f"--aux-bits and --last-bits name a rotated codec, but --codec names {name}: give "
            "one or the other"
        )
