"""Read JSON from elsewhere within bounds: nesting too deep for Python, and files larger than any
valid record, are ValueErrors like any other mistake.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Json = dict[str, Any]

LARGEST = (
    64 << 20
)  # bytes of a file that is read whole: configs, records, manifests; tokenizers are not read here


def loads(text: str | bytes) -> Any:
    """As ``json.loads``, but raises ValueError for input nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read(path: Path) -> Any:
    """Read the JSON file ``path``. Raises ValueError or OSError."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{size:,} bytes, more than any valid file has")
    return loads(path.read_bytes().decode())
