"""Read several stores as one, with their samples concatenated, to train on all of them. They must
have the same target (weights, vocabulary and mask token) and the same layers; codecs may differ,
since a training row holds samples of one store (``train/data/stream.py``). Nothing is copied and no
store is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from dspark.cache.errors import MismatchError, UsageError
from dspark.cache.reader import Cache
from dspark.cache.records import Array, CodedSample, TokenSample

if TYPE_CHECKING:
    import torch

    from dspark.cache.manifest import Manifest
    from dspark.cache.target.frozen import FrozenTarget


class JoinedCache:
    """``stores`` read as one: sample ``starts[s] + i`` is sample i of store s."""

    def __init__(self, stores: Sequence[Cache]) -> None:
        """Raises MismatchError, naming store and difference, unless they are of one target and
        layers; UsageError for one store twice.
        """
        self.stores = tuple(stores)
        first = self.stores[0]
        if len({store.path.resolve() for store in self.stores}) < len(self.stores):
            raise UsageError(
                f"a store is given twice: {self}. To repeat it, give its passes: --cache STORE=2"
            )
        for other in self.stores[1:]:
            if differences := list(_differences(first, other)):
                raise MismatchError(
                    f"{other.path} cannot be trained on together with {first.path}: "
                    f"{'; '.join(differences)}. Stores in one training need the same "
                    "target and layers."
                )

    def __str__(self) -> str:
        return ", ".join(str(store.path) for store in self.stores)

    @property
    def path(self) -> str:
        """The stores' paths, for messages."""
        return str(self)

    @property
    def remote(self) -> bool:
        """Tell whether reading from any of them takes requests."""
        return any(store.remote for store in self.stores)

    @property
    def manifest(self) -> Manifest:
        """The first store's manifest, for what all have in common."""
        return self.stores[0].manifest

    @property
    def target(self) -> FrozenTarget:
        return self.stores[0].target

    def embedding_on(self, device: torch.device) -> torch.Tensor:
        """The target's frozen embedding on ``device``, once for all stores."""
        return self.stores[0].embedding_on(device)

    @cached_property
    def starts(self) -> Array:
        """First sample of each store, and the number of samples, int64[stores + 1]."""
        return np.cumsum([0, *map(len, self.stores)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def index(self) -> dict[str, Array]:
        """``sample_key`` uint8[N, 16] of all samples."""
        return {"sample_key": np.concatenate([store.index["sample_key"] for store in self.stores])}

    @cached_property
    def lengths(self) -> Array:
        """Tokens of each sample, int64[N]."""
        return np.concatenate([store.lengths for store in self.stores])

    def of(self, i: int) -> int:
        """Return which store sample ``i`` is in."""
        return int(np.searchsorted(self.starts, i, side="right")) - 1

    def _at(self, i: int) -> tuple[Cache, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        store = self.of(i)
        return self.stores[store], i - int(self.starts[store])

    def tokens(self, i: int) -> TokenSample:
        """Read sample ``i`` without its states."""
        store, own = self._at(i)
        return store.tokens(own)

    def read(self, i: int) -> CodedSample:
        """Read sample ``i`` as its store coded it."""
        store, own = self._at(i)
        return store.read(own)


# What a training reads from.
Stores = Cache | JoinedCache


def _differences(a: Cache, b: Cache) -> Any:
    one, two = a.manifest, b.manifest
    pairs: dict[str, tuple[object, object]] = {"layers": (list(one.layers), list(two.layers))}
    for name in ("vocab_size", "hidden_size", "num_layers", "mask_token_id", "weights_sha256"):
        pairs[name] = (getattr(one.target, name), getattr(two.target, name))
    for name, (there, here) in pairs.items():
        if there != here:
            of = f" (targets {one.target.id}, {two.target.id})" if name == "weights_sha256" else ""
            yield f"{name} {here} against {there}{of}"
