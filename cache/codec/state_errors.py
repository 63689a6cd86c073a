"""States that cannot be stored, named by row, token and layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from dspark.cache.errors import EngineError
from dspark.cache.records import TokenSample, last_rows

if TYPE_CHECKING:
    import torch


class StateError(EngineError):
    """A value that cannot be stored. ``index``: its place in ``aux`` [T, L, H] or ``last``
    [M, H]; ``conversation``: the key of the conversation whose states these are, if one asked.
    """

    conversation: int | None = None

    def __init__(self, wrong: str, index: list[int], found: float, then: str) -> None:
        self.index, self._said = index, (f"hidden state {wrong}", f"found {found}, expected {then}")
        layer = f", aux layer index {index[1]}" if len(index) == 3 else " (last state)"
        place = f"token {index[0]}{layer}, channel {index[-1]}"
        super().__init__(f"{self._said[0]} at {place}: {self._said[1]}")

    def named(
        self, samples: Sequence[TokenSample], layers: Sequence[int], corpus: str
    ) -> EngineError:
        """Return the same error with row, token and layer of the store. ``samples``: those whose
        states were together, from ``corpus``.
        """
        aux = len(self.index) == 3
        rows = [
            np.arange(len(s.input_ids)) if aux else np.flatnonzero(last_rows(s.loss_mask))
            for s in samples
        ]
        at, left = 0, self.index[0]
        while left >= len(rows[at]):
            left -= len(rows[at])
            at += 1
        layer = f"layer {layers[self.index[1]]}" if aux else "the last state"
        return EngineError(
            f"{self._said[0]}: row {samples[at].row} of {corpus} (counted from 0), token "
            f"{rows[at][left]} of its sample, {layer}, channel {self.index[-1]}: {self._said[1]}"
        )


@contextmanager
def naming(samples: Sequence[TokenSample], layers: Sequence[int], corpus: str) -> Iterator[None]:
    """Within it, a value that cannot be stored is an error that names row, token and layer
    (``StateError.named``).
    """
    try:
        yield
    except StateError as error:
        raise error.named(samples, layers, corpus) from error


def check_finite(*states: torch.Tensor) -> None:
    """Refuse NaN and infinity, naming the first row (and layer) that has one. Waits for the device
    once, however many are given.
    """
    import torch

    # Both ends of the values in one pass; NaN is an end, too.
    ends = [end.double() for x in states if x.numel() for end in torch.aminmax(x)]
    if not ends or bool(torch.isfinite(torch.stack(ends)).all()):
        return
    x = next(x for x in states if not bool(torch.isfinite(x).all()))
    first = (~torch.isfinite(x)).nonzero()[0].tolist()
    raise StateError(
        "is not finite",
        first,
        float(x[tuple(first)]),
        "a finite value. Run the target in bfloat16 or float32 (float16 overflows on massive "
        "activations), or leave the row out.",
    )
