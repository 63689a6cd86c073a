"""One transform of the transform codec on a GPU: as ``half.py`` in plain torch, but in a few passes
over memory.

A product's input is written once, by kernels, in the order of the product's rows: coefficients and
embeddings for the decoder, rows in two parts and embeddings for the encoder. The products differ
only in the order of summation, so a value at a cell's edge may fall to either side; ``usable``
compares the two once per transform and device.

Legend: T rows, C channels of a row, K coefficients, F features, W bytes of a row's code, H hidden
size.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.klt.half import Half

log = logging.getLogger(__name__)
BUFFER = 1 << 28  # bytes of a product's input
ROWS = 8192  # at once, at most
TRIED, VOCABULARY = 256, 64  # rows and ids of the trial
# Shares in a trial: bytes that differ, and the difference of decoded rows. Real ones: 1e-4 and 4e-3
# (the rounding of bfloat16).
BYTES_APART, ROWS_APART = 5e-3, 2e-2


@dataclass(frozen=True, slots=True)
class Seen:
    """What rows are predicted from: ``ids`` int64 [E, T], each a row of ``embedding`` [V, H] (zeros
    for -1); before them the first ``context`` coefficients of rows ``at`` int64 [T] of ``code``,
    which ``half`` reads, none of them coarse. ``coarse`` bool [T]: which of the rows themselves
    are (``Transform``); None: none.
    """

    ids: torch.Tensor
    embedding: torch.Tensor
    half: Half | None = None
    code: torch.Tensor | None = None
    at: torch.Tensor | None = None
    context: int = 0
    coarse: torch.Tensor | None = None

    def plain(self) -> torch.Tensor:
        """The features [T, F] as one tensor: the reference."""
        import torch

        dtype = torch.float32 if self.half is None else self.half.dtype
        found = [
            self.embedding.index_select(0, i.clamp(min=0)).to(dtype) * (i >= 0)[:, None]
            for i in self.ids
        ]
        if self.half is not None and self.code is not None and self.at is not None:
            read = self.half.read(self.code.index_select(0, self.at))
            found.insert(0, read[:, : self.context])
        return torch.cat(found, 1)

    def write(self, out: torch.Tensor, column: int) -> None:
        """Write the features to ``out`` [T, ...] from ``column`` on."""
        from dspark.cache.codec.klt import kernels

        if self.half is not None and self.code is not None:
            kernels.unpack(
                out[:, column:],
                self.code,
                self.half.table.packing,
                self.half.values,
                self.at,
                self.context,
            )
        kernels.embeddings(out, self.embedding, self.ids, column + self.context)


def rows_at_once(half: Half) -> int:
    """Return how many rows make a product's input of ``BUFFER`` bytes."""
    width = max(half.encoder.shape[0], half.decoder.shape[0])
    return max(256, min(ROWS, BUFFER // (width * half.dtype.itemsize) // 256 * 256))


def encode(half: Half, x: torch.Tensor, seen: Seen) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``Half.encode``."""
    import torch

    from dspark.cache.codec.klt import kernels

    table = half.table
    both = torch.empty(x.shape[0], half.encoder.shape[0], dtype=half.dtype, device=x.device)
    kernels.standardised(both, x, half.mean, half.inverse)
    seen.write(both, 2 * table.channels)
    y, scale = half.product(both, half.encoder), half.scale(seen.coarse)
    code, moved = kernels.pack(y, table.step, table.packing, scale)
    outside = ~(moved <= table.limit)
    return torch.where(outside[:, None], nothing(half), code), outside


def decode(half: Half, code: torch.Tensor, seen: Seen, out: torch.Tensor) -> None:
    """Write rows to ``out`` [T, C], as ``Half.read`` of ``code`` and ``seen.coarse``, and
    ``Half.rows`` of that and ``seen.plain()``.
    """
    import torch

    from dspark.cache.codec.klt import kernels

    kept = half.table.kept
    both = torch.empty(code.shape[0], half.decoder.shape[0], dtype=half.dtype, device=code.device)
    coarse = seen.coarse if half.table.kinds == 2 else None
    kernels.unpack(both, code, half.table.packing, half.values, coarse=coarse)
    seen.write(both, kept)
    both[:, kept + half.features :] = 1
    if out.dtype == half.dtype:
        with torch.autocast(code.device.type, enabled=False):
            torch.mm(both, half.decoder, out=out)
    else:
        out.copy_(half.product(both, half.decoder))


@lru_cache(maxsize=8)
def nothing(half: Half) -> torch.Tensor:
    """Return the code uint8 [W] of a row of zeros."""
    import torch

    from dspark.cache.codec.klt.symbols import pack

    with torch.inference_mode(False):
        return pack(torch.zeros(1, half.table.kept, device=half.mean.device), half.table.packing)[0]


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def has_kernels(device: torch.device) -> bool:
    """Tell whether there are kernels for ``device``: on CUDA, if triton is installed."""
    return device.type == "cuda" and _has_triton()


def encodes(half: Half) -> bool:
    """Tell whether ``encode`` may replace ``Half.encode``: if there are kernels and a trial agrees
    with plain torch.
    """
    return has_kernels(half.mean.device) and _tried(half, encoding=True)


def decodes(half: Half) -> bool:
    """As ``encodes``, of ``decode``: a training compiles nothing to encode with."""
    return has_kernels(half.mean.device) and _tried(half, encoding=False)


@lru_cache(maxsize=16)
def _tried(half: Half, *, encoding: bool) -> bool:
    import torch

    trial, most, of = (
        (bytes_apart, BYTES_APART, "bytes") if encoding else (rows_apart, ROWS_APART, "rows")
    )
    with torch.inference_mode():
        try:
            apart = trial(half)
        except Exception as error:  # a compiler of another version raises what it likes
            log.warning(
                "the transform codec's kernels do not run here; coding in plain torch: %s", error
            )
            return False
    agrees = apart <= most  # NaN does not
    if not agrees:
        log.warning(
            "the transform codec's kernels disagree with plain torch here (%.1e of the %s); coding "
            "in plain torch",
            apart,
            of,
        )
    return agrees


def bytes_apart(half: Half) -> float:
    """Return the share of bytes that ``encode`` and plain torch code differently, of random
    rows.
    """
    x, seen = _trial(half)
    (code, _), (want, _) = encode(half, x, seen), half.encode(x, seen.plain(), seen.coarse)
    return float((code != want).sum()) / max(code.numel(), 1)


def rows_apart(half: Half) -> float:
    """Return the relative difference of what ``decode`` and plain torch make of random codes."""
    import torch

    x, seen = _trial(half)
    code, _ = half.encode(x, seen.plain(), seen.coarse)
    found = torch.empty_like(x)
    decode(half, code, seen, found)
    reference = half.rows(half.read(code, seen.coarse), seen.plain())
    return float((found.float() - reference).norm() / reference.norm().clamp(min=1e-9))


def _trial(half: Half) -> tuple[torch.Tensor, Seen]:
    """Return rows like those that ``half`` codes, and what they are predicted from."""
    import torch

    table, device = half.table, half.mean.device
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, VOCABULARY, (1, TRIED), generator=g).to(device)
    embedding = (torch.randn(VOCABULARY, half.features, generator=g) * 0.02).to(device, half.dtype)
    coarse = (torch.arange(TRIED) % 3 == 0).to(device)
    seen = Seen(ids, embedding, coarse=coarse)
    y = torch.randn(TRIED, table.kept, generator=g).to(device) * table.step
    # rounded as the states are, which the kernels are compiled for
    x = half.rows(y.to(half.dtype), seen.plain()).to(half.dtype)
    return x, seen
