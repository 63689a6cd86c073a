"""speculators' offline training data as a source of samples: a data set on disk
(datasets.save_to_disk) and a safetensors file per sample.

    state.json, dataset_info.json, data-*.arrow    columns input_ids, loss_mask
    hidden_states/hs_{row}.safetensors             hidden_states [S, L + 1, H], token_ids [S]

The files do not say which layers they hold; the last slot is the last decoder layer *before* the
final norm, as in vLLM's extraction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark.cache.errors import DamagedCacheError, UsageError
from dspark.tools.importers.source import Found, Given

STATES = "hidden_states"


class SpeculatorsSource:
    """Random access to speculators' per-sample files; a row without a file has no sample."""

    name = "speculators"
    version = "1"
    layers: list[int] | None = None
    sha256: str | None = None
    last_after_norm = False

    def __init__(self, path: Path) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UsageError(
                f"{path} is a data set on disk, and the package `datasets` is not installed: pip "
                "install datasets."
            ) from error
        self.path = path
        try:
            rows = datasets.load_from_disk(str(path))
        except Exception as error:  # pyarrow and datasets raise many unrelated kinds
            raise DamagedCacheError(f"{path}: the data set cannot be read: {error}") from error
        missing = {"input_ids", "loss_mask"} - set(rows.column_names)
        if missing:
            raise DamagedCacheError(
                f"{path}: no column {', '.join(sorted(missing))}, found {rows.column_names}"
            )
        self._rows: Any = rows.with_format(None)
        self.lengths = [len(ids) for ids in self._rows["input_ids"]]
        first = next((i for i in range(len(self)) if self._file(i).is_file()), None)
        if first is None:
            raise DamagedCacheError(
                f"{path / STATES}: found none of hs_0 to hs_{len(self) - 1}.safetensors"
            )
        shape = self._load(first)[STATES].shape
        if len(shape) != 3 or shape[1] < 2:
            raise DamagedCacheError(
                f"{self._file(first)}: hidden_states {tuple(shape)}, expected [tokens, layers + "
                "1, hidden]"
            )
        self.slots, self.hidden = int(shape[1]) - 1, int(shape[2])

    def _file(self, i: int) -> Path:
        return self.path / STATES / f"hs_{i}.safetensors"

    def _load(self, i: int) -> dict[str, torch.Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            out = load_file(self._file(i))
        except (OSError, SafetensorError) as error:
            raise DamagedCacheError(f"{self._file(i)}: cannot be read: {error}") from error
        missing = {STATES, "token_ids"} - out.keys()
        if missing:
            raise DamagedCacheError(
                f"{self._file(i)}: no tensor {', '.join(sorted(missing))}, found {sorted(out)}"
            )
        return out

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def mean_tokens(self) -> float:
        return sum(self.lengths) / len(self) if len(self) else 0.0

    def read(self, i: int) -> Found:
        if not self._file(i).is_file():
            return "no file of hidden states"
        row, data = self._rows[i], self._load(i)
        ids = np.asarray(row["input_ids"], np.int32)
        mask = np.asarray(row["loss_mask"]).astype(np.bool_)
        states = data[STATES]
        if not np.array_equal(data["token_ids"].numpy(), ids):
            return "its token ids differ from the data set's"
        if mask.shape != ids.shape or tuple(states.shape) != (
            ids.size,
            self.slots + 1,
            self.hidden,
        ):
            raise DamagedCacheError(
                f"{self._file(i)}: hidden_states {tuple(states.shape)} and loss_mask "
                f"{mask.shape} for {ids.size} tokens, "
                f"expected [{ids.size}, {self.slots + 1}, {self.hidden}]"
            )
        return Given(input_ids=ids, loss_mask=mask, aux=states[:, :-1], last=states[:, -1])
