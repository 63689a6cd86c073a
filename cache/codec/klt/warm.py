"""Load and compile what the transform codec runs on a GPU before it is needed.

The solvers' libraries are hundreds of megabytes that a process reads when it first uses them, and
triton compiles each kernel in a fraction of a second: seconds on a fresh machine. They pass in a
thread while the states to learn from are still captured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING

from dspark.cache.codec.klt.codec import Klt
from dspark.cache.codec.klt.symbols import CLASSES, Packing, band_count
from dspark.cache.codec.klt.tables import Tables, Transform

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.base import Codec, Tokens

# of the columns of each class: odd numbers of bytes, so that kernels are compiled for any alignment
BYTES = (15, 15, 11, 7)
SIZE = 64  # tokens, and rows of the embedding


@contextmanager
def warming(
    codec: Codec, layers: int, hidden: int, device: torch.device | str | None
) -> Iterator[None]:
    """Warm ``device`` for learning and coding with ``codec`` during the ``with`` block, which ends
    when that is done; nothing is done for another codec, nor without a GPU. What does not run is
    left for the real work to refuse.
    """
    if not isinstance(codec, Klt) or device is None or not str(device).startswith("cuda"):
        yield
        return
    thread = Thread(target=_warm, args=(codec, layers, hidden, device), name="dspark-warm")
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _warm(codec: Klt, layers: int, hidden: int, device: torch.device | str) -> None:
    import torch

    try:
        with torch.inference_mode():
            warm(codec, layers, hidden, torch.device(device))
    except (RuntimeError, ImportError):  # CUDA's errors too: learning meets them again, and tells
        return


def warm(codec: Klt, layers: int, hidden: int, device: torch.device) -> None:
    """Solve small equations and code a few rows on ``device``."""
    import torch

    small = torch.eye(SIZE, dtype=torch.float64, device=device)
    torch.linalg.eigh(small)
    torch.linalg.solve(small, small) @ small
    small.float() @ small.float()
    known = _tokens(hidden, device)
    aux = torch.zeros(SIZE, layers, hidden, dtype=torch.bfloat16, device=device)
    last = torch.zeros(len(known.last_token), hidden, dtype=torch.bfloat16, device=device)
    coder = codec.with_tables(tables(layers, hidden, codec.coarse))
    coder.decode(coder.encode(aux, last, known), hidden, known, torch.bfloat16)


def tables(layers: int, hidden: int, coarse: float) -> Tables:
    """Return tables that predict nothing and code some channels as they are."""
    aux = _identity(layers * hidden, 2 * hidden, coarse)
    return Tables(aux, _identity(hidden, aux.kept + 3 * hidden, 1.0), layers, hidden, aux.kept)


def _identity(channels: int, features: int, coarse: float) -> Transform:
    import torch

    columns = tuple(n * count for n, (_, count) in zip(BYTES, CLASSES, strict=True))
    packing = Packing(columns)
    kinds = 1 if coarse == 1 else 2
    return Transform(
        mean=torch.zeros(channels),
        deviation=torch.ones(channels),
        back=torch.eye(packing.total, channels, dtype=torch.bfloat16),
        forward=None,
        predict=torch.zeros(features, channels, dtype=torch.bfloat16),
        offsets=torch.zeros(2 * kinds, band_count(packing)),
        step=1.0,
        packing=packing,
        limit=1e9,
        noise=0.0,
        bits=0.0,
        coarse=coarse,
    )


def _tokens(hidden: int, device: torch.device) -> Tokens:
    import torch

    from dspark.cache.codec.base import Tokens

    at = torch.arange(SIZE, device=device)
    start = torch.tensor([0, SIZE], device=device)
    embedding = torch.zeros(SIZE, hidden, dtype=torch.bfloat16, device=device)
    return Tokens(at, start, at[SIZE // 2 : -1], embedding)
