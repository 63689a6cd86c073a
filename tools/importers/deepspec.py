"""A DeepSpec target cache (its version 2) as a source of samples.

    manifest.json    version, hidden_size, target_layer_ids (outputs of decoder layers, 0-based),
    shards, how it was made samples.idx      a record of 56 bytes per sample: where its five tensors
    are shard-*.bin      the tensors: ids int32[S], attention mask and loss mask uint8[S], states
    bfloat16[S, L H], last state bfloat16[S, H]

The last state is the one after the final norm, at every token. Nothing in it has a checksum: all
that can be checked is that everything is present and of the right size.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark.cache import json_text
from dspark.cache.errors import DamagedCacheError, FormatVersionError
from dspark.cache.files.checksum import file_sha256
from dspark.tools.importers.source import Found, Given
from dspark.tools.shapes import Optional, fault

VERSION = 2
RECORD = np.dtype(
    [
        ("sample_id", "<u8"),
        ("shard", "<u4"),
        ("tokens", "<u4"),
        ("input_ids", "<u8"),
        ("attention_mask", "<u8"),
        ("loss_mask", "<u8"),
        ("aux", "<u8"),
        ("last", "<u8"),
    ]
)
DTYPES = {
    "hidden_dtype": "bfloat16",
    "token_dtype": "int32",
    "mask_dtype": "uint8",
    "index_record_size": 56,
}
SHAPE = {
    "version": int,
    "num_samples": int,
    "target_layer_ids": [int],
    "hidden_size": int,
    "shards": [{"file_name": str}],
    "max_length": Optional(int),
    **{name: type(value) for name, value in DTYPES.items()},
}


class DeepSpecSource:
    """Random access to a DeepSpec target cache."""

    name = "deepspec"
    last_after_norm = True

    def __init__(self, path: Path) -> None:
        self.path = path
        where = path / "manifest.json"
        try:
            self.manifest: dict[str, Any] = json_text.read(where)
        except (OSError, ValueError) as error:
            raise DamagedCacheError(f"{where}: cannot be read: {error}") from error
        wrong = fault(self.manifest, SHAPE)
        if wrong is not None:
            raise DamagedCacheError(
                f"{where}: {wrong}; expected the manifest of a DeepSpec target cache"
            )
        found = {"version": self.manifest["version"], **{k: self.manifest[k] for k in DTYPES}}
        known = {"version": VERSION, **DTYPES}
        if found != known:
            raise FormatVersionError(f"{where}: found {found}, this release imports {known}")
        self.layers: list[int] | None = [int(i) for i in self.manifest["target_layer_ids"]]
        self.hidden = int(self.manifest["hidden_size"])
        self.version = str(VERSION)
        self.slots = len(self.manifest["target_layer_ids"])
        self._index = self._read_index()
        self.sha256: str | None = file_sha256(path / "samples.idx")
        self._shards = [self._map(shard["file_name"]) for shard in self.manifest["shards"]]

    def _read_index(self) -> Any:
        where = self.path / "samples.idx"
        try:
            raw = where.read_bytes()
        except OSError as error:
            raise DamagedCacheError(f"{where}: {error.strerror}") from error
        expected = int(self.manifest["num_samples"]) * RECORD.itemsize
        if len(raw) != expected:
            raise DamagedCacheError(
                f"{where}: {len(raw)} bytes, expected {expected} ({self.manifest['num_samples']} "
                f"samples of {RECORD.itemsize})"
            )
        index = np.frombuffer(raw, RECORD)
        if not np.array_equal(index["sample_id"], np.arange(len(index))):
            raise DamagedCacheError(f"{where}: its sample ids are not 0, 1, 2, ...")
        return index

    def _map(self, name: str) -> Any:
        where = self.path / name
        try:
            return np.memmap(where, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise DamagedCacheError(f"{where}: cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self._index)

    @property
    def longest(self) -> int:
        """Return the tokens of the longest sample, or the limit that the cache was made with."""
        return max(
            int(self._index["tokens"].max(initial=0)), int(self.manifest.get("max_length") or 0)
        )

    def mean_tokens(self) -> float:
        return float(self._index["tokens"].mean()) if len(self) else 0.0

    def read(self, i: int) -> Found:
        record = self._index[i]
        tokens = int(record["tokens"])

        def field(name: str, dtype: str, *shape: int) -> Any:
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            start, shard = int(record[name]), int(record["shard"])
            if shard >= len(self._shards) or start + size > self._shards[shard].size:
                raise DamagedCacheError(
                    f"{self.path}: sample {i}: {name} is at bytes {start}-{start + size} of "
                    f"shard {shard}, which does not exist"
                )
            return self._shards[shard][start : start + size].view(dtype).reshape(shape)

        if not field("attention_mask", "<u1", tokens).all():
            raise DamagedCacheError(
                f"{self.path}: sample {i}: its attention mask hides some of its {tokens} tokens"
            )
        return Given(
            input_ids=np.array(field("input_ids", "<i4", tokens), np.int32),
            loss_mask=field("loss_mask", "<u1", tokens) != 0,
            aux=_bfloat16(field("aux", "<i2", tokens, self.slots, self.hidden)),
            last=_bfloat16(field("last", "<i2", tokens, self.hidden)),
        )


def _bfloat16(x: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(x, np.int16)).view(torch.bfloat16)
