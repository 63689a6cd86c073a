"""The spool between a vLLM worker and us: one safetensors file a request, read once and deleted; and what the worker is told.

``<file>.lock`` is held exclusively from before the request's path is known until its file is there (vLLM's own protocol);
``<file>.error`` holds the reason when the worker could not write it; ``<file>.rank1`` ... hold the states of the other tensor-parallel ranks where they
were asked for. ``coding.json`` and ``norm.pt`` tell the worker how to code states.

Legend: T tokens of a request, n extracted layers, H hidden size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.codec import Codec, codec_from, field_info
from dspark.cache.layout import field_array
from dspark.cache.manifest import FieldInfo

if TYPE_CHECKING:
    import torch

ERROR = ".error"
STORED, COMPARE, SKIP = (
    "dspark_stored",
    "dspark_compare",
    "dspark_skip",
)  # keys of a request's kv_transfer_params
CODING, NORM = "coding.json", "norm.pt"
RANK_SECONDS = 60.0  # how long another rank may take longer than the first


@dataclass(frozen=True, slots=True)
class Coding:
    """How a worker codes a request. ``columns``: of the n extracted states, those that the store keeps; ``last``: the one before the final ``norm``."""

    aux: Codec
    last: Codec
    columns: list[int]
    last_column: int
    norm: torch.nn.Module

    def encode(self, states: torch.Tensor, stored: Sequence[Sequence[int | None]]) -> dict[str, torch.Tensor]:
        """``states[T, n, H]`` -> the codecs' arrays under the names they have in a part; ``stored``: runs ``[start, stop)`` of stored last states, None: to the end."""
        import torch

        rows = torch.cat([states[a:b, self.last_column] for a, b in stored] or [states[:0, self.last_column]])
        coded = {"aux": self.aux.encode(states[:, self.columns]), "last": self.last.encode(self.norm(rows))}
        return {field_array(f, name): t for f, arrays in coded.items() for name, t in arrays.items()}


def write_coding(folder: Path, coding: Coding) -> None:
    """Before the first coded request."""
    import torch

    torch.save(coding.norm, folder / (NORM + ".part"))
    os.replace(folder / (NORM + ".part"), folder / NORM)
    body = {
        "aux": dataclasses.asdict(field_info(coding.aux)),
        "last": dataclasses.asdict(field_info(coding.last)),
        "columns": coding.columns,
        "last_column": coding.last_column,
    }
    (folder / (CODING + ".part")).write_text(json.dumps(body))
    os.replace(folder / (CODING + ".part"), folder / CODING)


def read_coding(folder: str, device: torch.device) -> Coding:
    """In a worker."""
    import torch

    path = Path(folder) / CODING
    body: Mapping[str, Any] = json.loads(path.read_text())
    # Our own file, written by the process that started this one.
    norm = torch.load(Path(folder) / NORM, map_location=device, weights_only=False)
    aux, last = (codec_from(FieldInfo(**body[f]), str(path)) for f in ("aux", "last"))
    return Coding(aux, last, body["columns"], body["last_column"], norm)


def report_failure(filename: str, error: BaseException) -> None:
    """Leave the reason where the reader looks; a few bytes fit on most disks that are full."""
    # Where even that fails, the file is missing without a reason, and the reader says so.
    with contextlib.suppress(OSError), open(filename + ERROR, "w", encoding="utf-8") as file:
        file.write(f"{type(error).__name__}: {error}")


def read_spooled(filename: str) -> dict[str, torch.Tensor]:
    """Wait for a spool file, read it and delete it. Raises OSError with the worker's reason if it was not written."""
    with open(filename + ".lock", "rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
    try:
        return _take(filename)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(filename + ".lock")


def read_rank(filename: str, rank: int) -> dict[str, torch.Tensor]:
    """What another rank spooled for the same request; waits for it. Raises OSError if it does not come."""
    name = f"{filename}.rank{rank}"
    end = time.monotonic() + RANK_SECONDS
    while not os.path.exists(name) and not os.path.exists(name + ERROR) and time.monotonic() < end:
        time.sleep(0.01)
    return _take(name)


def _take(filename: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    try:
        if os.path.exists(filename + ERROR):
            with open(filename + ERROR, encoding="utf-8") as file:
                raise OSError(f"the worker could not write {filename}: {file.read()}")
        if not os.path.exists(filename):
            raise OSError(f"the worker left no {filename}: it died, or its disk is full")
        with open(filename, "rb") as file:
            return load(file.read())
    finally:
        for name in (filename, filename + ".part", filename + ERROR):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
