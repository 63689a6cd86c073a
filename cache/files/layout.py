"""Where everything is in a store, and how many bytes it takes: pure functions, no I/O.
docs/format.md says the same in prose.

    hs.zarr/ zarr.json            Zarr v3 group; attributes.dspark = the manifest, sealed with a
    crc32c target/              model.safetensors (frozen weights), config.json, tokenizer files
    calibration.safetensors   the codec's calibration, if any parts/000000000000/  Zarr v3 group;
    attributes.dspark_part = the part's record, sealed input_ids ...      one array each, one shard
    file each index/               written when the dump finishes: where every sample lies

Legend: T tokens of a part, N samples of a part, M stored last states of a part, L aux layers, H
hidden size.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dspark.cache.codec.base import ArraySpec, Codec, axis_of

if TYPE_CHECKING:
    from dspark.cache.repeats import Repeats

ROOT_KEY = "dspark"
PART_KEY = "dspark_part"
INDEX_KEY = "dspark_index"
PARTS, INDEX, TARGET = "parts", "index", "target"
CALIBRATION = "calibration.safetensors"
SOURCE_STRIDE = 10**8  # maximum blocks per source
TAG_BYTES = 16
# Arrays of a part that hold no states.
PLAIN_ARRAYS = frozenset(
    {
        "input_ids",
        "loss_mask",
        "sample_start",
        "sample_last_start",
        "sample_row",
        "sample_key",
        "sample_turn",
    }
    | {"sample_exact_start", "exact_position", "exact_row"}
)
EXACT_START, EXACT_POSITION, EXACT_ROW = "sample_exact_start", "exact_position", "exact_row"
TARGET_WEIGHTS, TARGET_CONFIG, TARGET_TOKENIZER = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
)
TARGET_TEMPLATE = "chat_template.jinja"

# Tokens per chunk of a state array. A random sample of S tokens reads about S + STATE_CHUNK of
# them, and each chunk costs a fixed time to look up, check and decode; 128 keeps the over-read of a
# 1,000-token sample near 13 %.
STATE_CHUNK = 128
# For uncompressed states, a chunk is copied and summed while it is in the L2 cache; the rows are a
# power of two.
PLAIN_BYTES, PLAIN_CHUNK = 256 << 10, (32, 256)
TOKEN_CHUNK = 4096  # of input_ids and loss_mask: 16 kB before compression


@dataclass(frozen=True, slots=True)
class StoredArray:
    """One array of a part: ``shape``, ``dtype``, inner ``chunk`` along the first axis, byte-shuffle
    element size (0 = none), zstd level (0 = uncompressed). ``columns``: a chunk is transposed, so
    that values that repeat along rows are adjacent.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    chunk: int
    shuffle: int
    level: int = 3
    columns: bool = False  # inside a chunk, the first axis runs fastest


def part_number(source: int, block: int) -> int:
    """Return the number of the part that holds block ``block`` of source ``source``; parts are
    ordered by number.
    """
    assert 0 <= block < SOURCE_STRIDE, block
    return source * SOURCE_STRIDE + block


def part_name(number: int, version: int = 2) -> str:
    """Return the folder of part ``number``: four digits for the source and eight for the block
    (version 1: eight for the part).
    """
    return f"{number:08d}" if version == 1 else f"{number:012d}"


def shard_tag(digest: str, number: int, array: str, tokens_sha256: str = "") -> bytes:
    """Return the tag that the shard of ``array`` of part ``number`` begins with; no other array,
    part, plan or, with ``tokens_sha256``, tokens has the same.
    """
    own = f"{digest} {part_name(number)} {array}" + (f" {tokens_sha256}" if tokens_sha256 else "")
    return hashlib.sha256(own.encode()).digest()[:TAG_BYTES]


@dataclass(frozen=True, slots=True)
class PartLayout:
    """The arrays of a store's parts: its codec's, for ``layers`` aux layers of ``hidden`` channels,
    and those of tokens and samples.
    """

    codec: Codec
    layers: int
    hidden: int

    def small(self, tokens: int, samples: int, exact: int, version: int = 2) -> list[StoredArray]:
        """The arrays of a part with T tokens, N samples and X exactly stored tokens that are not
        states.
        """
        # Ids and mask are packed like the states: decompressing them would be a fifth of a read.
        plain = self.codec.pack == "none"
        out = [
            StoredArray(
                "input_ids", (tokens,), "int32", TOKEN_CHUNK, 0 if plain else 4, 0 if plain else 3
            ),
            StoredArray("loss_mask", (tokens,), "bool", TOKEN_CHUNK, 0, 0 if plain else 3),
            StoredArray("sample_start", (samples + 1,), "int64", samples + 1, 8),
            StoredArray("sample_last_start", (samples + 1,), "int64", samples + 1, 8),
            StoredArray("sample_row", (samples,), "int64", max(samples, 1), 8),
            StoredArray("sample_key", (samples, 16), "uint8", max(samples, 1), 0),
        ]
        if version > 1:
            out.append(StoredArray("sample_turn", (samples,), "int32", max(samples, 1), 4))
        if self.exact:
            out.append(StoredArray(EXACT_START, (samples + 1,), "int64", samples + 1, 8))
            out.append(StoredArray(EXACT_POSITION, (exact,), "int32", TOKEN_CHUNK, 4))
            out.append(StoredArray(EXACT_ROW, (exact,), "int32", TOKEN_CHUNK, 4))
        return out

    def states(self, tokens: int, last_rows: int) -> list[StoredArray]:
        """The codec's arrays whose sizes follow from the tokens."""
        rows = {"token": tokens, "last": last_rows}
        return [
            state_array(n, (rows[s.axis], *s.row_shape), s)
            for n, s in self.specs.items()
            if s.axis != "exact"
        ]

    def distinct(self, rows: int) -> list[StoredArray]:
        """The codec's arrays of exactly stored tokens, of which a part has ``rows`` different
        ones.
        """
        return [state_array(n, (rows, *s.row_shape), s) for n, s in self.exact.items()]

    def arrays(
        self,
        tokens: int,
        samples: int,
        last_rows: int,
        exact: tuple[int, int] = (0, 0),
        version: int = 2,
    ) -> list[StoredArray]:
        """Every array of a part; ``exact``: tokens stored exactly, and different rows among
        them.
        """
        small = self.small(tokens, samples, exact[0], version)
        return small + self.states(tokens, last_rows) + self.distinct(exact[1])

    @property
    def exact(self) -> dict[str, ArraySpec]:
        """The codec's arrays of exactly stored tokens."""
        return {n: s for n, s in self.specs.items() if s.axis == "exact"}

    @property
    def specs(self) -> dict[str, ArraySpec]:
        """The codec's arrays."""
        out = self.codec.arrays(self.layers, self.hidden)
        assert all(spec.axis == axis_of(name) for name, spec in out.items()), out
        return out


def state_array(name: str, shape: tuple[int, ...], spec: ArraySpec) -> StoredArray:
    """Describe how array ``spec`` of a codec is stored."""
    # Packed codes have no byte structure to shuffle; 16-bit values do (exponent bytes repeat,
    # mantissa bytes do not). Level 1 for codes: only their entropy can be removed, since no level
    # finds repeats. Level 3 for 16-bit values: on SmolLM2 states one core packs 360, 132, 43 MB/s
    # at levels 1, 3, 5 for ratios 1.23, 1.29, 1.37 (docs/log/2026-11-22-where-the-time-went.md).
    if spec.pack == "none":
        assert spec.order == "rows", name
        row = int(np.prod(shape[1:])) * np.dtype(spec.dtype).itemsize
        rows = spec.chunk or min(
            max(2 ** round(math.log2(PLAIN_BYTES / row)), PLAIN_CHUNK[0]), PLAIN_CHUNK[1]
        )
        return StoredArray(name, shape, spec.dtype, rows, 0, 0)
    wide = np.dtype(spec.dtype).itemsize
    shuffle, level = (wide, 3) if wide > 1 else (0, 1)
    return StoredArray(
        name, shape, spec.dtype, spec.chunk or STATE_CHUNK, shuffle, level, spec.order == "columns"
    )


def raw_bytes_per_token(layers: int, hidden: int) -> int:
    """Return the bytes per token of the uncompressed bf16 layout that other projects use: ids 4 +
    two mask bytes, L aux layers and the last state at every token.
    """
    return 6 + 2 * hidden * (layers + 1)


def stored_bytes_per_token(
    layers: int, hidden: int, codec: Codec, last_share: float = 1.0
) -> float:
    """Return the bytes of states per token before lossless compression, which no store exceeds;
    ``last_share`` = stored last states / tokens.

    Tokens that are stored exactly are not counted: they are few.
    """
    share = {"token": 1.0, "last": last_share, "exact": 0.0}
    return sum(share[s.axis] * s.row_bytes for s in codec.arrays(layers, hidden).values())


def disk_bytes_per_token(
    layers: int,
    hidden: int,
    codec: Codec,
    last_share: float = 1.0,
    repeats: Repeats | None = None,
) -> float:
    """Return the expected bytes per token on disk: states, ids and mask; metadata of parts and
    samples apart. Exact without zstd.
    """
    return token_bytes(codec) + codec.disk_bytes(layers, hidden, last_share, repeats)


def token_bytes(codec: Codec) -> float:
    """Return the expected bytes of ids and mask per token on disk: 4 and 1 uncompressed, 1.0
    together after zstd, measured on SmolLM2 stores.
    """
    return 5.0 if codec.pack == "none" else 1.0
