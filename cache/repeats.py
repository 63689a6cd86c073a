"""How much of a text says again what it has just said: what zstd will find in the codes of its
states, told from ids alone.

A state follows from all tokens before it. After the same few tokens the states of early layers are
nearly the same, and after the same long run those of all layers, so that some of their codes are
equal; zstd finds them where they are in one chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dspark.cache.files.layout import STATE_CHUNK
from dspark.cache.records import last_rows

if TYPE_CHECKING:
    from dspark.cache.records import TokenSample

SHORT, LONG = 2, 64  # tokens
PRIME = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers have inverses modulo 2^64


class Repeats(NamedTuple):
    """Shares of rows before which, in their chunk, is one that ends the same ``short`` or ``long``
    run of tokens; ``last``: of stored last states, the latter.
    """

    short: float = 0.0
    long: float = 0.0
    last: float = 0.0

    @classmethod
    def of(cls, samples: Sequence[TokenSample]) -> Repeats:
        if not samples:
            return cls()
        short, long = (
            np.concatenate([runs(s.input_ids, n) for s in samples]) for n in (SHORT, LONG)
        )
        stored = np.concatenate([last_rows(s.loss_mask) for s in samples])
        return cls(share(short), share(long), share(long[stored]))


def runs(ids: Any, length: int) -> Any:
    """Return uint64 [T]: a hash of the ``length`` ids that end at each token of a sample; equal
    beginnings of samples are equal too.
    """
    ids = ids.astype(np.uint64) + np.uint64(1)
    power = np.cumprod(np.full(len(ids), PRIME, np.uint64))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(ids * power)])
    inverse = np.cumprod(np.full(len(ids), np.uint64(pow(int(PRIME), -1, 1 << 64)), np.uint64))
    end = np.arange(1, len(ids) + 1)
    begin = np.maximum(end - length, 0)
    return (sums[end] - sums[begin]) * inverse[begin]


def share(hashes: Any) -> float:
    """Return the share of ``hashes`` that their chunk of ``STATE_CHUNK`` rows has before them."""
    chunks = np.array_split(hashes, range(STATE_CHUNK, len(hashes), STATE_CHUNK))
    again = sum(len(c) - len(np.unique(c)) for c in chunks)
    return again / max(len(hashes), 1)
