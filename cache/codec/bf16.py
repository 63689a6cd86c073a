"""16 bits per value: the bfloat16 bits unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dspark.cache.codec.base import ArraySpec
from dspark.cache.codec.state_errors import check_finite
from dspark.cache.json_text import Json
from dspark.cache.settings import DEFAULT_PACKING

if TYPE_CHECKING:
    import torch

    from dspark.cache.codec.base import Tensors

# measured: bfloat16 states of SmolLM2-135M (three corpora: 12.1 to 12.2), shuffled, zstd level 3
LOSSLESS_BITS = 12.15


@dataclass(frozen=True, slots=True)
class Bf16:
    """The bfloat16 bits of each value. Lossless for a bfloat16 target; a float32 state is rounded
    to nearest even.
    """

    name: str = "bf16"
    bits: int = 16
    pack: str = DEFAULT_PACKING

    @property
    def params(self) -> Json:
        return {}

    def disk_bytes(self, hidden: int, short: float = 0.0, long: float = 0.0) -> float:
        return hidden * (LOSSLESS_BITS if self.pack == "zstd" else 16) / 8

    def arrays(self, hidden: int) -> dict[str, ArraySpec]:
        return {"code": ArraySpec("uint16", hidden, self.pack)}

    def encode(self, x: torch.Tensor) -> Tensors:
        import torch

        check_finite(x)
        return {"code": x.to(torch.bfloat16).contiguous().view(torch.uint16)}

    def decode(
        self, coded: Mapping[str, torch.Tensor], hidden: int, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        import torch

        return coded["code"].view(torch.bfloat16).to(dtype or torch.bfloat16)
