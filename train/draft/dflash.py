"""DFlash: the parallel backbone alone. vLLM's dspark model always builds a Markov head, so the
draft is served with a head whose bias is zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspark.cache.errors import DraftError, UsageError
from dspark.train.draft.config import DraftConfig
from dspark.train.draft.dspark import DSpark

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SERVED_RANK = 8
_ZERO_MARKOV = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")


class DFlash(DSpark):
    name = "dflash"
    summary = "the parallel backbone alone"

    def check(self, config: DraftConfig) -> None:
        if config.markov_rank != 0:
            raise UsageError("a dflash draft has no Markov head: markov_rank must be 0")
        if config.enable_confidence_head:
            raise UsageError("a dflash draft has no confidence head")

    def recognises(self, flat: Mapping[str, Any]) -> bool:
        return not flat.get("markov_rank")

    def own(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        return super().own(flat) | {"markov_rank": 0}

    def to_flat(self, config: DraftConfig) -> dict[str, Any]:
        return config.flat_fields() | {"markov_rank": SERVED_RANK, "markov_head_type": "vanilla"}

    def servable_by_vllm(self, config: DraftConfig) -> bool:
        return True

    def sized(self, **fields: Any) -> DraftConfig:
        return super().sized(**fields | {"markov_rank": 0, "enable_confidence_head": False})

    def served(
        self, tensors: dict[str, Tensor], config: DraftConfig, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        like = next(iter(tensors.values()))
        sizes = zip(_ZERO_MARKOV, (config.vocab_size, config.draft_vocab_size), strict=True)
        zeros = {name: like.new_zeros(rows, SERVED_RANK, dtype=dtype) for name, rows in sizes}
        return {**tensors, **zeros}

    def learnt(self, stored: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
        for name in _ZERO_MARKOV:
            if name in stored and bool(stored[name].any()):
                raise DraftError(
                    f"{path}: {name} of a dflash draft is not zero; config.json and the weights "
                    "do not belong together"
                )
        return {name: tensor for name, tensor in stored.items() if name not in _ZERO_MARKOV}


DFLASH = DFlash()
