"""The store of hidden states: ``dspark.cache.open(path) -> Cache``. Format: docs/format.md.

Importing this package imports neither torch nor zarr; ``open`` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspark.cache.reader import Cache

__all__ = ["open"]


def open(path: str | Path, *, allow_incomplete: bool = False) -> Cache:
    """Open the store at ``path`` for reading; see ``dspark.cache.reader.open`` for what it
    raises.
    """
    from dspark.cache import reader

    return reader.open(path, allow_incomplete=allow_incomplete)
