"""JSON that others wrote, read within bounds: nesting that Python cannot follow and files no record
of ours can have are ValueErrors like any other mistake.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LARGEST = (
    64 << 20
)  # bytes of a file that is read whole: configs, records, manifests; tokenizers are not read here


def loads(text: str | bytes) -> Any:
    """``json.loads``, but ValueError for what is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def read(path: Path) -> Any:
    """What the JSON file ``path`` holds. Raises ValueError or OSError."""
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{size:,} bytes, more than any such file has")
    return loads(path.read_bytes().decode())
