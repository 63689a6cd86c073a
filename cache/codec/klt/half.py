"""One transform of the transform codec on one device: rows to cells and back, in plain torch.

Cells are computed in float32 (on CUDA with the states in two bfloat16 parts), so if a coefficient
is within rounding of a cell's edge, another device may choose the neighbouring cell, with the same
error. On CUDA the decoder's products use bfloat16: their error is 45 dB below the states, while the
cells' own error is 10 to 15 dB below.

Legend: T rows, C channels of a row, K coefficients, F features, W bytes of a row's code.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING

from dspark.cache.codec.klt.symbols import cells_of, pack, unpack, value_table

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.klt.tables import Transform


MAKING = Lock()
ALIGN = 8  # values: matrix products on a GPU are fast if rows are multiples of 16 bytes


@dataclass(frozen=True, slots=True, eq=False)
class Half:
    """``encoder`` [C + F, K]: forward, and minus predict @ forward. If ``split``, for rows in two
    parts, [2 C + F, K or a few more]: forward twice, and columns of zeros. ``decoder`` [K + F + 2
    or a few more, C]: coefficients and features to a row's deviation from the mean, then the mean
    in two parts, and zeros. Both in ``dtype``: float32, on CUDA bfloat16. ``mean``, ``inverse`` (of
    the deviation) float32 [C].
    ``limits`` float32 [K]: the largest cell of each column. ``values``: what bytes decode to
    (``symbols.value_table``).
    """

    table: Transform
    dtype: torch.dtype
    split: bool
    encoder: torch.Tensor
    decoder: torch.Tensor
    mean: torch.Tensor
    inverse: torch.Tensor
    limits: torch.Tensor
    values: list[torch.Tensor]

    @classmethod
    def of(cls, table: Transform, device: torch.device, dtype: torch.dtype, split: bool) -> Half:
        import torch

        def there(x: torch.Tensor) -> torch.Tensor:
            return x.to(device).float()

        forward = there(table.back.t() if table.forward is None else table.forward).to(dtype)
        subtract = (there(table.predict) @ forward.float()).to(dtype)
        restore = (there(torch.cat([table.back, table.predict])) * there(table.deviation)).to(dtype)
        mean = there(table.mean)
        high = mean.to(dtype)
        tail = torch.zeros(
            2 + -(len(restore) + 2) % ALIGN, table.channels, dtype=dtype, device=device
        )
        tail[0], tail[1] = high, (mean - high.float()).to(dtype)
        encoder = torch.cat([forward, *([forward] if split else []), -subtract])
        if split:
            encoder = torch.nn.functional.pad(encoder, (0, -table.kept % ALIGN))
        return cls(
            table=table,
            dtype=dtype,
            split=split,
            encoder=encoder.contiguous(),
            decoder=torch.cat([restore, tail]),
            mean=mean,
            inverse=1.0 / there(table.deviation),
            limits=torch.tensor(table.packing.limits(), dtype=torch.float32, device=device),
            values=[
                x.to(device, dtype)
                for x in value_table(table.packing, table.step, table.offsets, table.coarse)
            ],
        )

    @property
    def features(self) -> int:
        return int(self.table.predict.shape[0])

    def product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``a @ b`` in float32; ``a`` rounded to ``dtype``, which ``b`` has."""
        import torch

        if self.dtype == torch.float32:
            with torch.autocast(a.device.type, enabled=False):
                return a.float() @ b
        return torch.mm(a.to(self.dtype), b, out_dtype=torch.float32)

    def coefficients(self, x: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """``y`` float32 [T, K] of rows ``x`` [T, C] with ``features`` [T, F]."""
        z = (x.float() - self.mean) * self.inverse
        encoder = self.encoder[:, : self.table.kept]
        forward, less = encoder[: z.shape[1]], encoder[len(encoder) - self.features :]
        y = self.product(z, forward)
        if self.split:  # what the rounding of z left over
            y += self.product(z - z.to(self.dtype).float(), forward)
        return y + self.product(features, less)

    def encode(
        self, x: torch.Tensor, features: torch.Tensor, coarse: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode rows ``x`` [T, C] to uint8 [T, W]; also returns bool [T]: which of them the cells
        cannot hold (their code is that of zeros). ``coarse`` bool [T]: which rows are; None: none.
        """
        y = self.coefficients(x, features)
        scale = self.scale(coarse)
        if scale is not None:
            y *= scale[:, None]
        cells, outside = cells_of(y, self.table.step, self.limits, self.table.limit)
        return pack(cells, self.table.packing), outside

    def scale(self, coarse: torch.Tensor | None) -> torch.Tensor | None:
        """What to multiply coefficients by so that one step serves all rows, float32 [T]."""
        import torch

        if coarse is None or self.table.kinds == 1:
            return None
        return torch.where(coarse, 1.0 / self.table.coarse, 1.0)

    def read(self, code: torch.Tensor, coarse: torch.Tensor | None = None) -> torch.Tensor:
        """Read the coefficients [T, K] in ``dtype``; ``coarse`` as in ``encode``."""
        return unpack(
            code, self.table.packing, self.values, coarse if self.table.kinds == 2 else None
        )

    def rows(self, y: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Compute rows float32 [T, C] from coefficients that ``read`` returned."""
        import torch

        both = torch.cat([y, features.to(self.dtype)], 1)
        return self.product(both, self.decoder[: both.shape[1]]).add_(self.mean)


def half_on(table: Transform, device: torch.device) -> Half:
    """Return ``table`` on ``device``, made once, also where threads ask for it together: making it
    takes gigabytes for a large target.
    """
    with MAKING:
        return _made(table, device)


@lru_cache(maxsize=8)
def _made(table: Transform, device: torch.device) -> Half:
    import torch

    cuda = device.type == "cuda"
    with torch.inference_mode(False), torch.no_grad():
        return Half.of(table, device, torch.bfloat16 if cuda else torch.float32, split=cuda)
