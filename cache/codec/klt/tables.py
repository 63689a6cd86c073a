"""What the transform codec knows about a target and its corpus: one ``Transform`` for the aux
layers and one for the last state.

A transform predicts a row x from features f that the decoder has too, and quantises what is left in
a basis with one step s:

    encoder    y = ((x - mean) / deviation) @ forward - f @ predict @ forward, q = y / s, rounded
    decoder    x = mean + deviation * (y' @ back + f @ predict), y' = mean of y in the cell q

Rows may be of two kinds, of which both sides know which is which: fine ones, s = ``step``, and
coarse ones, s = ``coarse`` times ``step``.

All of it is in the tensors of the store's calibration file; docs/format.md lists them.

Legend: C channels of a row (L * H or H), K coefficients kept, F features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspark.cache.codec.klt.symbols import Packing, band_count
from dspark.cache.errors import DamagedCacheError

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.base import Tensors

PARTS = ("mean", "deviation", "back", "forward", "predict", "offsets")
NUMBERS = ("step", "limit", "noise", "bits")
CONTEXT = 2  # hidden sizes of aux coefficients that the last state is predicted from


@dataclass(frozen=True, slots=True, eq=False)
class Transform:
    """``mean``, ``deviation`` float32 [C]; ``back`` bfloat16 [K, C]; ``forward`` bfloat16 [C, K],
    None if it is ``back`` transposed; ``predict`` bfloat16 [F, C]; ``offsets`` float32 [2, bands],
    or of two kinds of rows [4, bands] (``symbols.value_table``).

    ``limit``: a row whose cells would have to move by more than this (sum of squares, in units of
    its step over ``step``) to fit their classes is stored exactly. ``noise``: summed squared error
    of an ordinary row's coefficients, in the same units. ``bits``: bits per row on disk that the
    calibration expected. ``coarse``: 1 where rows are of one kind.
    """

    mean: torch.Tensor
    deviation: torch.Tensor
    back: torch.Tensor
    forward: torch.Tensor | None
    predict: torch.Tensor
    offsets: torch.Tensor
    step: float
    packing: Packing
    limit: float
    noise: float
    bits: float
    coarse: float = 1.0

    @property
    def kinds(self) -> int:
        """Of rows."""
        return 1 if self.coarse == 1 else 2

    @property
    def channels(self) -> int:
        return int(self.back.shape[1])

    @property
    def kept(self) -> int:
        return int(self.back.shape[0])

    def tensors(self, field: str) -> Tensors:
        """Return the tensors by name, on the CPU."""
        import torch

        found = {f"{field}_{n}": getattr(self, n) for n in PARTS}
        out = {n: t.detach().cpu().contiguous() for n, t in found.items() if t is not None}
        out[f"{field}_columns"] = torch.tensor(self.packing.columns, dtype=torch.int64)
        numbers = [getattr(self, n) for n in NUMBERS]
        return out | {f"{field}_numbers": torch.tensor(numbers, dtype=torch.float64)}


@dataclass(frozen=True, slots=True, eq=False)
class Tables:
    """Both transforms. ``context``: how many leading aux coefficients the last state is predicted
    from.

    ``digest``: sha256 of all tensors, so that equal tables compare equal.
    """

    aux: Transform
    last: Transform
    layers: int
    hidden: int
    context: int

    def tensors(self) -> Tensors:
        """Return the contents of the calibration file."""
        import torch

        shape = torch.tensor([self.layers, self.hidden, self.context], dtype=torch.int64)
        return {**self.aux.tensors("aux"), **self.last.tensors("last"), "shape": shape}

    def digest(self) -> str:
        """sha256 over names and bytes of all tensors."""
        import torch

        out = hashlib.sha256()
        for name, t in sorted(self.tensors().items()):
            out.update(name.encode())
            out.update(t.flatten().view(torch.uint8).numpy().data)
        return out.hexdigest()

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], where: str, coarse: float = 1.0) -> Tables:
        """Make tables from the contents of a calibration file, with ``coarse`` for the aux layers.
        Raises DamagedCacheError if they are inconsistent.
        """
        try:
            layers, hidden, context = tensors["shape"].tolist()
            aux = _transform(tensors, "aux", where, coarse)
            last = _transform(tensors, "last", where)
        except (KeyError, ValueError, TypeError) as error:
            raise DamagedCacheError(
                f"{where}: not a calibration of this codec: {error!r}"
            ) from error
        expected = {
            "aux channels": (aux.channels, layers * hidden),
            "last channels": (last.channels, hidden),
            "aux features": (aux.predict.shape[0], 2 * hidden),
            "last features": (last.predict.shape[0], context + 3 * hidden),
        }
        if wrong := [f"{n} {a}, expected {b}" for n, (a, b) in expected.items() if a != b]:
            raise DamagedCacheError(f"{where}: {'; '.join(wrong)}")
        return cls(aux, last, layers, hidden, context)


def _transform(
    tensors: Mapping[str, torch.Tensor], field: str, where: str, coarse: float = 1.0
) -> Transform:
    """Make one transform and check its shapes against each other."""
    own: dict[str, Any] = {n: tensors.get(f"{field}_{n}") for n in PARTS}
    packing = Packing(tuple(tensors[f"{field}_columns"].tolist()))
    numbers = dict(zip(NUMBERS, tensors[f"{field}_numbers"].tolist(), strict=True))
    out = Transform(packing=packing, **own, **numbers, coarse=coarse)
    k, c = out.kept, out.channels
    expected = {
        "mean": (c,), "deviation": (c,), "back": (packing.total, c), "forward": (c, k),
        "predict": (out.predict.shape[0], c), "offsets": (2 * out.kinds, band_count(packing)),
    }  # fmt: skip
    for name, shape in expected.items():
        found = getattr(out, name)
        if found is not None and tuple(found.shape) != shape:
            raise DamagedCacheError(
                f"{where}: {field}_{name} is {tuple(found.shape)}, expected {shape}"
            )
    return out
