"""Choose the step of the transform codec: the one at which a corpus takes the bits on disk that
were asked for.

Bits are not estimated but measured, as a store would spend them: cells are packed into bytes, cut
into chunks and compressed by zstd, and rows that cells cannot hold are counted as stored exactly.
The entropy of cells is no substitute. zstd loses up to a sixth against it in Huffman codes of
bytes that are mostly zero, and gains as much from tokens of one sample being alike, differently in
each corpus.

Legend: n rows, K coefficients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dspark.cache.codec.base import ArraySpec
from dspark.cache.codec.bf16 import LOSSLESS_BITS
from dspark.cache.codec.klt.codec import CHUNK
from dspark.cache.codec.klt.search import step_for
from dspark.cache.codec.klt.symbols import Packing, cells_of, offsets_of, pack, quantise
from dspark.cache.shared.phases import Phases

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.klt.tables import Transform

STEP_ROWS = 1 << 14  # of each kind that set the step, about
LEAST_SHARE = 0.0015  # of a column's cells that are not 0: with fewer it is not kept (0.02 bits)
# a row is exact where its classes would add this many times an ordinary row's error
EXACT_NOISE = 2.0


@dataclass(frozen=True, slots=True)
class Rows:
    """Coefficients ``y`` [n, K] of samples in the order of a store, scaled so that one step serves
    all (``Half.scale``), zeros where a token is massive; ``coarse`` bool [n]: which rows are;
    ``massive``: how many of the massive ones are stored exactly, first tokens of samples apart.
    """

    y: torch.Tensor
    coarse: torch.Tensor
    massive: int = 0

    @classmethod
    def of(cls, blocks: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Rows:
        """Join blocks of coefficients, of what is coarse, and of what is massive, bool [n]."""
        import torch

        y, coarse, massive = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        return cls(y, coarse, int(massive.sum()))

    def offsets(self, table: Transform) -> torch.Tensor:
        """Return ``offsets`` for each kind of rows that ``table`` has."""
        import torch

        y = self.y[:, : table.packing.total]
        kinds = [y] if table.kinds == 1 else [y[~self.coarse], y[self.coarse]]
        return torch.cat([offsets_of(rows, table.step, table.packing) for rows in kinds])

    def bits(self, table: Transform) -> float:
        """Bits per row on disk."""
        import torch

        from dspark.cache.sizing import packed_bytes

        y = self.y[:, : table.packing.total]
        limits = torch.tensor(table.packing.limits(), dtype=y.dtype, device=y.device)
        cells, outside = cells_of(y, table.step, limits, table.limit)
        code = pack(cells, table.packing).cpu().numpy()
        spec = ArraySpec("uint8", code.shape[1], order="columns", chunk=CHUNK)
        exact = (int(outside.sum()) + self.massive) * table.channels * LOSSLESS_BITS
        return (8 * packed_bytes("code", code, spec) + exact) / max(len(y), 1)


@dataclass(frozen=True, slots=True)
class Corpus:
    """What stands for a corpus: rows of ``new`` samples, which the transform was not fitted to, and
    of its ``own``, which are ``share`` of the corpus and take fewer bits. ``over``: how many times
    the bits of ``new`` the corpus takes, by what can be told of all its samples.
    """

    new: Rows
    own: Rows | None
    share: float
    over: float = 1.0

    def bits(self, table: Transform) -> float:
        """Bits per row on disk."""
        new = self.over * self.new.bits(table)
        if self.own is None:
            return new
        return (1 - self.share) * new + self.share * self.own.bits(table)


def stepped(
    whole: Transform, corpus: Corpus, bits: float, phases: Phases | None = None
) -> Transform:
    """Return ``whole`` with the step at which rows of ``corpus`` take ``bits`` each, and the
    columns worth keeping. Each measurement is one of ``phases``.
    """
    y, seen = corpus.new.y, phases or Phases()
    tried: dict[float, tuple[Transform, float]] = {}

    def bits_at(step: float) -> float:
        with seen.phase("step"):
            table = at_step(whole, y, step)
            tried[step] = table, corpus.bits(table)
        return tried[step][1]

    step = step_for(bits_at, y.square().mean(0).sqrt().double().cpu().numpy(), bits)
    if step not in tried:
        bits_at(step)
    found, spent = tried[step]
    kept = found.packing.total
    return dataclasses.replace(
        found,
        back=whole.back[:kept].clone(),
        forward=None if whole.forward is None else whole.forward[:, :kept].clone(),
        offsets=corpus.new.offsets(found),
        bits=spent,
    )


def at_step(whole: Transform, y: torch.Tensor, step: float) -> Transform:
    """Return ``whole``, all its columns, with the packing and limit for rows like ``y`` [n, K] at
    ``step``; its offsets are still to be set.
    """
    q = quantise(y, step)
    wanted = ((q != 0).float().mean(0) > LEAST_SHARE).nonzero()[:, 0]
    # one at least, also where all states are what was predicted: an array has a width
    packing = Packing.fitting(q[:, : int(wanted[-1]) + 1 if wanted.numel() else 1])
    kept = slice(0, packing.total)
    noise = float((y[:, kept] - q[:, kept] * step).square().sum(1).median())
    return dataclasses.replace(
        whole,
        step=step,
        packing=packing,
        noise=noise,
        limit=EXACT_NOISE * noise,
    )
