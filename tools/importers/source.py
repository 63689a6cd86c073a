"""What an importer needs from another project's cache: samples by index, and what their states are.

Legend: S tokens of a sample, L aux layers, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


@dataclass(frozen=True, slots=True)
class Given:
    """One sample as the other cache holds it: ``input_ids`` int32[S], ``loss_mask`` bool[S],
    ``aux`` [S, L, H], ``last`` [S, H].
    """

    input_ids: np.ndarray[Any, np.dtype[np.int32]]
    loss_mask: np.ndarray[Any, np.dtype[np.bool_]]
    aux: torch.Tensor
    last: torch.Tensor


Found = Given | str  # or why there is no sample under this index


class Source(Protocol):
    """``layers``: outputs of decoder layers, None if the cache does not say; ``slots``: how many.
    ``last_after_norm``: where its last state was taken. ``sha256``: of what identifies this cache,
    or None.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def layers(self) -> list[int] | None: ...
    @property
    def last_after_norm(self) -> bool: ...
    @property
    def hidden(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def sha256(self) -> str | None: ...
    @property
    def longest(self) -> int: ...
    def mean_tokens(self) -> float: ...
    def __len__(self) -> int: ...
    def read(self, i: int) -> Found: ...
