"""The one place that names codecs. A new codec is a module and a line in ``FAMILIES``. Only the
requested family is imported, so that ``--help`` stays instant.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from dspark.cache.errors import FormatVersionError, UsageError
from dspark.cache.json_text import Json
from dspark.cache.settings import DEFAULT_PACKING, FALLBACK, NAMED, PACKINGS, full_name

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.base import Codec, Family

# First word of a codec's name -> the module whose ``FAMILY`` (``base.Family``) makes it.
FAMILIES = {
    "klt": "dspark.cache.codec.klt.codec",
    "lossless": "dspark.cache.codec.fields",
    "rotated": "dspark.cache.codec.fields",
}


def family(name: str) -> Family | None:
    """Return the family of codec ``name``; None if there is none."""
    module = FAMILIES.get(name.split("-", maxsplit=1)[0])
    out: Family | None = import_module(module).FAMILY if module else None
    return out


def names() -> list[str]:
    """List every codec that ``make`` knows by its full name."""
    modules = dict.fromkeys(FAMILIES.values())
    return [name for module in modules for name in import_module(module).FAMILY.names()]


def make(name: str, pack: str = DEFAULT_PACKING) -> Codec:
    """Make the codec that ``--codec`` and ``--pack`` name (a short name such as ``default``, or a
    full one), not yet calibrated.
    """
    full = full_name(name)
    found = family(full)
    if found is None:
        raise UsageError(
            f"--codec {name}: no such codec; choose {', '.join(dict.fromkeys([*NAMED, *names()]))}"
        )
    return found.make(full, pack)


def suited(name: str, asked: bool, tokens: int, layers: int, hidden: int) -> tuple[str, str | None]:
    """Return the full name of the codec for a corpus of ``tokens``: ``name``, or ``FALLBACK`` and
    the reason. Raises UsageError if ``name`` was ``asked`` for and the corpus is too small to
    calibrate it.
    """
    least = make(name).least_tokens(layers, hidden)
    if tokens >= least:
        return name, None
    found = (
        f"{name} is calibrated on the corpus and needs {least:,} tokens; the corpus has about "
        f"{tokens:,}"
    )
    if asked:
        raise UsageError(
            f"--codec {found}. Give more rows, choose --codec {FALLBACK}, or omit --codec."
        )
    return FALLBACK, found


def load(
    name: str, params: Json, pack: str, calibration: Mapping[str, torch.Tensor], where: str
) -> Codec:
    """Load the codec that a store recorded. Raises FormatVersionError for one that this release
    does not know.
    """
    found = family(name)
    if found is None or pack not in PACKINGS:
        what = f"codec {name!r}" if found is None else f"packing {pack!r}"
        raise FormatVersionError(
            f"{where}: this release does not know {what} (codecs {', '.join(names())}; packings "
            f"{', '.join(PACKINGS)}). Use the dspark release that wrote the store."
        )
    try:
        return found.load(name, params, pack, calibration, where)
    except UsageError as error:
        raise FormatVersionError(
            f"{where}: {error}. Use the dspark release that wrote the store."
        ) from error


def on_host(codec: Codec) -> Codec:
    """Return ``codec`` with what it has learnt in host memory, to be sent to another process. Sent
    as it is, a GPU's memory would be shared: the other process takes half a gigabyte there for
    that alone, and torch warns at the end of this one.
    """
    learnt = codec.calibration()
    if not learnt:
        return codec
    return load(codec.name, codec.params, codec.pack, learnt, codec.name)
