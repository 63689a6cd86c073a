"""The spool between a vLLM worker and us: one safetensors file a request, read once and deleted.

``<file>.lock`` is held exclusively from before the request's path is known until its file is there (vLLM's own protocol);
``<file>.error`` holds the reason when the worker could not write it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ERROR = ".error"


def report_failure(filename: str, error: BaseException) -> None:
    """Leave the reason where the reader looks; a few bytes fit on most disks that are full."""
    # Where even that fails, the file is missing without a reason, and the reader says so.
    with contextlib.suppress(OSError), open(filename + ERROR, "w", encoding="utf-8") as file:
        file.write(f"{type(error).__name__}: {error}")


def read_spooled(filename: str) -> dict[str, torch.Tensor]:
    """Wait for a spool file, read it and delete it. Raises OSError with the worker's reason if it was not written."""
    from safetensors.torch import load

    with open(filename + ".lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        if os.path.exists(filename + ERROR):
            with open(filename + ERROR, encoding="utf-8") as file:
                raise OSError(f"the worker could not write {filename}: {file.read()}")
        if not os.path.exists(filename):
            raise OSError(f"the worker left no {filename}: it died, or its disk is full")
        with open(filename, "rb") as file:
            return load(file.read())
    finally:
        for name in (filename, filename + ".part", filename + ".lock", filename + ERROR):
            if os.path.exists(name):
                os.unlink(name)
