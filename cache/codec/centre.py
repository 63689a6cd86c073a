"""Mean and deviation of each channel, measured before a dump, so that what is the same at every
token is not coded again.

About half the energy of a real state is its mean over tokens, and channels differ in deviation by a
factor of 10. On SmolLM2-135M (five layers, held-out text, 2.0 bits per value) taking both out
raises the SNR from 10.2 to 13.4 dB, and the SNR of the average channel against its own variance
from 4.5 to 10.3 dB; ``bench/codec_frontier.py`` measures it. It costs the decoder one multiply-add
per value.

Legend: T tokens, L aux layers, H hidden size. The vectors are bfloat16, in the manifest, in base64.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import DamagedCacheError

if TYPE_CHECKING:
    import torch

    from dspark.cache.json_text import Json

CENTRE_KEYS = frozenset({"mean", "deviation"})
# a row whose norm is this many times its layer's median is left out: first tokens carry massive
# activations
MASSIVE = 10.0
# of the layer's median deviation, so that a constant channel does not divide by zero
LEAST_DEVIATION = 1e-3
# Tokens. For the means 4,000 are enough (250 lose 1.7 dB, 1,000 lose 0.5); the size of the store is
# measured on them too, and is within 2 % from 15,000 (docs/log/2026-11-22-compact-cache.md).
CALIBRATION = 16384
LEAST_SAMPLES = (
    # minimum number of samples: a corpus is often sorted by topic, and one long sample is one topic
    32
)


def spread(total: int, tokens_a_sample: float, budget: int = CALIBRATION) -> list[int]:
    """Choose which of ``total`` samples to calibrate on: evenly spread, about ``budget`` tokens in
    all, and at least ``LEAST_SAMPLES``.
    """
    wanted = math.ceil(budget / max(tokens_a_sample, 1.0))
    count = min(total, max(LEAST_SAMPLES, wanted))
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def thin(states: torch.Tensor, samples: int, budget: int = CALIBRATION) -> torch.Tensor:
    """Take every n-th row of one sample's ``states`` [S, ...], so that ``samples`` long ones stay
    within about ``budget`` rows in all.
    """
    step = states.shape[0] * samples // budget
    return states[::step].clone() if step > 1 else states


@dataclass(frozen=True, slots=True)
class Centre:
    """``mean`` and ``deviation``: little-endian bfloat16 of [L, H] (or [H]), as bytes so that a
    codec stays hashable.
    """

    mean: bytes
    deviation: bytes

    @classmethod
    def of(cls, states: torch.Tensor) -> Centre:
        """Measure ``states[T, L, H]`` or ``[M, H]``; with fewer than two ordinary rows, returns 0
        and 1, which change nothing.
        """
        import torch

        x = states.detach()
        x = x[:, None] if x.ndim == 2 else x
        means, deviations = [], []
        for layer in x.unbind(1):
            rows = layer.double()
            norm = rows.norm(dim=1)
            kept = rows[norm <= MASSIVE * norm.median()] if len(rows) else rows
            if len(kept) < 2:
                means.append(rows.new_zeros(x.shape[2]))
                deviations.append(rows.new_ones(x.shape[2]))
                continue
            d = kept.std(0)
            median = d.median()
            means.append(kept.mean(0))
            deviations.append(
                d.clamp(min=float(median) * LEAST_DEVIATION) if median > 0 else torch.ones_like(d)
            )
        return cls(_pack(torch.stack(means)), _pack(torch.stack(deviations)))

    def tensors(
        self, hidden: int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return mean, deviation and 1 / deviation, float32 [L, H] (or [H]) on ``device``."""
        return _tensors(self, hidden, device)

    def to_json(self) -> Json:
        return {
            "mean": base64.b64encode(self.mean).decode(),
            "deviation": base64.b64encode(self.deviation).decode(),
        }

    def stored(self) -> dict[str, torch.Tensor]:
        """Return ``mean`` and ``deviation`` as flat bfloat16 tensors, for a calibration file."""
        import numpy as np
        import torch

        def of(raw: bytes) -> torch.Tensor:
            return torch.from_numpy(np.frombuffer(raw, "<i2").astype(np.int16)).view(torch.bfloat16)

        return {"mean": of(self.mean), "deviation": of(self.deviation)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor], where: str) -> Centre:
        """Restore from what ``stored`` returned."""
        if set(tensors) != CENTRE_KEYS or tensors["mean"].shape != tensors["deviation"].shape:
            raise DamagedCacheError(
                f"{where}: the calibration holds {sorted(tensors)} for a field, expected "
                f"{sorted(CENTRE_KEYS)}, all of one size"
            )
        return cls(_pack(tensors["mean"]), _pack(tensors["deviation"]))

    @classmethod
    def from_json(cls, params: Mapping[str, Any], where: str) -> Centre:
        try:
            out = cls(
                *(base64.b64decode(params[name], validate=True) for name in ("mean", "deviation"))
            )
        except (TypeError, ValueError) as error:
            raise DamagedCacheError(
                f"{where}: channel means or deviations are not base64: {error}"
            ) from error
        if not out.mean or len(out.mean) != len(out.deviation) or len(out.mean) % 2:
            raise DamagedCacheError(
                f"{where}: found {len(out.mean)} bytes of channel means and {len(out.deviation)} "
                "of deviations, expected two of each per channel"
            )
        return out


def _pack(x: torch.Tensor) -> bytes:
    import torch

    return x.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().astype("<i2").tobytes()


@lru_cache(maxsize=16)
def _tensors(
    centre: Centre, hidden: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import numpy as np
    import torch

    with torch.inference_mode(False):
        out = []
        for raw in (centre.mean, centre.deviation):
            bits = torch.from_numpy(np.frombuffer(raw, "<i2").astype(np.int16)).view(torch.bfloat16)
            out.append(bits.float().view(-1, hidden).squeeze(0))
        mean, deviation = out
        return mean.to(device), deviation.to(device), (1.0 / deviation).to(device)
