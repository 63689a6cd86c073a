"""Read a store: ``open(path)`` -> ``Cache``, with random access by sample index. Nothing is read
before it is needed; a ``Cache`` is cheap to pickle, so each process that reads opens its own files
and shares no lock with another. Every chunk's crc32c is checked as it is read; a missing or damaged
one raises DamagedCacheError naming part and array.
"""

from __future__ import annotations

import dataclasses
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dspark.cache.canonical import sealed
from dspark.cache.codec.base import EXACT_TOKEN, Codec, Tokens, tokens_of
from dspark.cache.errors import (
    DamagedCacheError,
    IncompleteCacheError,
    reading,
)
from dspark.cache.files.calibration import stored_codec
from dspark.cache.files.layout import (
    EXACT_POSITION,
    EXACT_ROW,
    EXACT_START,
    PARTS,
    TARGET,
    TARGET_WEIGHTS,
    PartLayout,
    part_name,
)
from dspark.cache.files.place import in_parallel, place_of
from dspark.cache.files.urls import Where, where
from dspark.cache.manifest import Manifest
from dspark.cache.parts.index import (
    PART_ARRAYS,
    TURN,
    build_index,
)
from dspark.cache.parts.opened import open_part, open_parts
from dspark.cache.parts.record import PartRecord, read_record
from dspark.cache.parts.shard import Shard
from dspark.cache.parts.stored_index import stored_index
from dspark.cache.records import Array, CodedSample, Sample, TokenSample, last_rows
from dspark.cache.stored_manifest import read_manifest
from dspark.cache.target.files import what_to_do
from dspark.cache.target.frozen import FrozenTarget
from dspark.cache.target.logits import Logits

if TYPE_CHECKING:
    import torch

    from dspark.cache.records import Coded

TOKEN_ARRAYS = ("input_ids", "loss_mask")


def open(path: str | Where, *, allow_incomplete: bool = False) -> Cache:
    """Open the store at ``path``, a folder or a URL (``s3://``, ``gs://``, ``az://``), for reading.

    Raises NotACacheError, FormatVersionError, DamagedCacheError, or IncompleteCacheError unless
    ``allow_incomplete``.
    """
    path = where(path)
    manifest = read_manifest(path)
    if not manifest.complete and not allow_incomplete:
        with reading(path / PARTS):
            parts = sum(name.isdigit() for name in place_of(path).list(PARTS))
        raise IncompleteCacheError(
            f"{path}: the dump has not finished ({parts} parts so far). Run the same dspark-dump "
            "command with --resume."
        )
    return Cache(path, manifest)


class Cache:
    """A store opened for reading: ``len(cache)`` samples, ``cache[i]`` decoded, ``cache.read(i)``
    as stored.
    """

    def __init__(self, path: Where, manifest: Manifest) -> None:
        self.path = path
        self.place = place_of(path)
        self.manifest = manifest
        self.codec: Codec = stored_codec(self.place, manifest)
        self.layout = PartLayout(self.codec, len(manifest.layers), manifest.target.hidden_size)
        self._embedding: tuple[torch.device, torch.Tensor] | None = None
        self._open: OrderedDict[int, Mapping[str, Shard]] = OrderedDict()
        self._opening = threading.Lock()  # of parts, where several threads read

    @property
    def remote(self) -> bool:
        """Tell whether reading takes requests."""
        return self.place.remote

    def __getstate__(self) -> dict[str, Any]:
        """A remote store's index travels with it, so that a reading process does not ask for it."""
        state: dict[str, Any] = {"path": self.path, "manifest": self.manifest}
        if self.remote and self.manifest.complete and "index" in self.__dict__:
            state |= {"index": self.index, "_part_crc": self._part_crc}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state.pop("path"), state.pop("manifest"))  # type: ignore[misc]
        self.__dict__.update(state)

    # -- where everything is -----------------------------------------------------------------------

    @cached_property
    def index(self) -> dict[str, Array]:
        """Return the arrays of ``dspark.cache.parts.index``, from ``index/`` or, while incomplete,
        from the parts.
        """
        if not self.manifest.complete:
            return self._scan()
        index, self._part_crc = stored_index(self.place, self.manifest)
        return index

    def _scan(self) -> dict[str, Array]:
        """Build the index of a store that is being written from the parts that exist: in version 2
        any of them, since each is an independent block.
        """
        with reading(self.path / PARTS):
            names = [n for n in self.place.list(PARTS) if n.isdigit()]
        if self.manifest.format_version == 1:
            for i, name in enumerate(names):
                if name != part_name(i, 1):
                    missing = self.path / PARTS / part_name(i, 1)
                    raise DamagedCacheError(
                        f"{missing} is missing. Run dspark-dump --resume to write it again."
                    )
        self._numbers = [int(name) for name in names]
        small = PART_ARRAYS if self.manifest.format_version == 1 else (*PART_ARRAYS, TURN)
        whole = slice(0, None)
        return build_index(
            ({n: self._read(i, n, whole) for n in small} for i in range(len(names))), self._numbers
        )

    @cached_property
    def _numbers(self) -> list[int]:
        """Return the numbers of the parts, in order."""
        return self.index["part_number"].tolist()  # type: ignore[no-any-return]

    @property
    def part_crcs(self) -> list[int]:
        """Return the checksum of each part's record, from the index of a complete store."""
        _ = self.index
        return list(self._part_crc)

    def folder(self, part: int) -> Where:
        """Return where part ``part`` (counted from 0) is."""
        return self.path / PARTS / self._name(part)

    def _name(self, part: int) -> str:
        return part_name(self._numbers[part], self.manifest.format_version)

    def __len__(self) -> int:
        return int(self.index["sample_row"].shape[0])

    @property
    def stores(self) -> tuple[Cache, ...]:
        """This store alone; a ``JoinedCache`` has several."""
        return (self,)

    def of(self, i: int) -> int:
        """Return which of ``stores`` sample ``i`` is in."""
        return 0

    @property
    def starts(self) -> Array:
        """First sample of each of ``stores``, and the number of samples, int64[2]."""
        return np.array([0, len(self)], np.int64)

    @property
    def lengths(self) -> Array:
        """Tokens of each sample, int64[N]."""
        return np.diff(self.index["sample_start"])

    @property
    def parts(self) -> int:
        return int(self.index["part_first_sample"].shape[0]) - 1

    # -- samples -----------------------------------------------------------------------------------

    @cached_property
    def _first(self) -> list[int]:
        """Return the first sample of each part, and the number of samples, as plain ints, so that a
        search needs no numpy call.
        """
        return self.index["part_first_sample"].tolist()  # type: ignore[no-any-return]

    def _locate(self, i: int) -> tuple[int, slice, slice]:
        """Find the part of sample ``i`` and its token and last-state ranges within that part."""
        first = self._first
        n = first[-1]
        if not -n <= i < n:
            raise IndexError(f"sample {i} of {n}")
        i %= n
        part = bisect_right(first, i) - 1
        out = []
        for name in ("sample_start", "sample_last_start"):
            at = self.index[name].item
            base = at(first[part])
            out.append(slice(at(i) - base, at(i + 1) - base))
        return part, out[0], out[1]

    def tokens(self, i: int) -> TokenSample:
        """Read sample ``i`` without its states: only ids and mask."""
        part, span, _ = self._locate(i)
        return self._tokens(i, *self._arrays_of(part, [(n, span) for n in TOKEN_ARRAYS]))

    def _tokens(self, i: int, ids: Array, mask: Array) -> TokenSample:
        return TokenSample(
            row=int(self.index["sample_row"][i]),
            turn=int(self.index[TURN][i]),
            key=self.index["sample_key"][i].tobytes(),
            input_ids=ids,
            loss_mask=mask,
        )

    def _arrays_of(self, part: int, wanted: Sequence[tuple[str, slice]]) -> list[Any]:
        """Read rows of several arrays of a part, at the same time if each takes requests."""
        if self.place.remote:
            return in_parallel(lambda one: self._read(part, *one), wanted)
        return [self._read(part, n, span) for n, span in wanted]

    def read(self, i: int) -> CodedSample:
        """Read sample ``i`` as stored: codes, to be decoded where they are needed
        (``codec.decode``).
        """
        part, span, last = self._locate(i)
        rows = {"token": span, "last": last}
        wanted = [(n, span) for n in TOKEN_ARRAYS]
        wanted += [(n, rows[axis]) for n, axis in self._axes if axis != "exact"]
        ids, mask, *codes = self._arrays_of(part, wanted)
        tokens = self._tokens(i, ids, mask)
        states: Coded = dict(zip((n for n, _ in wanted[2:]), codes, strict=True))
        if self.layout.exact:
            states |= self._exact(part, i - self._first[part])
        return CodedSample(tokens, states)

    def _exact(self, part: int, i: int) -> Coded:
        """Read the exactly stored tokens of the part's sample ``i``: their positions as
        ``EXACT_TOKEN``, and their rows.
        """
        start, stop = self._read(part, EXACT_START, slice(i, i + 2)).tolist()
        out: Coded = {
            EXACT_TOKEN: self._read(part, EXACT_POSITION, slice(start, stop)).astype(np.int64)
        }
        rows = self._read(part, EXACT_ROW, slice(start, stop)).tolist()
        for name, spec in self.layout.exact.items():
            own = [self._read(part, name, slice(row, row + 1)) for row in rows]
            out[name] = np.concatenate(own) if own else np.empty((0, *spec.row_shape), spec.dtype)
        return out

    @cached_property
    def _axes(self) -> list[tuple[str, str]]:
        """The codec's arrays and their axes; computed once, because reads are hot."""
        return [(name, spec.axis) for name, spec in self.layout.specs.items()]

    def decoded(self, sample: CodedSample) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode a coded sample to float states: ``aux`` [S, L, H], ``last`` [M, H]."""
        import torch

        codes = {n: torch.from_numpy(x) for n, x in sample.states.items()}
        tokens = self.tokens_for_codec([sample.tokens]) if self.codec.needs_tokens else None
        aux, last = self.codec.decode(codes, self.manifest.target.hidden_size, tokens)
        return aux.float(), last.float()

    def tokens_for_codec(self, samples: Sequence[TokenSample]) -> Tokens:
        """Return what the codec may predict the states of concatenated ``samples`` from; on the
        CPU.
        """
        return tokens_of(samples, self.target.embed_tokens)

    def embedding_on(self, device: torch.device) -> torch.Tensor:
        """Return the target's frozen embedding on ``device``, moved there once."""
        # By what was asked for: a tensor on "cuda" says "cuda:0", and would be moved for every row.
        if self._embedding is None or self._embedding[0] != device:
            self._embedding = (device, self.target.embed_tokens.to(device))
        return self._embedding[1]

    def __getitem__(self, i: int) -> Sample:
        coded = self.read(i)
        ids, mask = coded.tokens.input_ids, coded.tokens.loss_mask
        rows = last_rows(mask)
        aux, stored = self.decoded(coded)
        last = np.zeros((ids.shape[0], self.manifest.target.hidden_size), dtype=np.float32)
        last[rows] = stored.numpy()
        return Sample(coded.tokens.row, coded.tokens.key, ids, mask, aux.numpy(), last, rows)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @cached_property
    def target(self) -> FrozenTarget:
        """Load the target's frozen weights: ``embed_tokens`` [V, H], ``norm`` [H], ``lm_head`` [V,
        H] (tied ones share memory), ``logits``.

        Raises DamagedCacheError unless the file matches the hash in the manifest.
        """
        path = self.target_files / TARGET_WEIGHTS
        try:
            weights = FrozenTarget.load(path, self.manifest.target.weights_sha256)
        except DamagedCacheError as error:
            raise DamagedCacheError(f"{error}. {what_to_do(self.path)}") from error
        shape = (self.manifest.target.vocab_size, self.manifest.target.hidden_size)
        if tuple(weights.embed_tokens.shape) != shape:
            raise DamagedCacheError(
                f"{path}: embed_tokens is {tuple(weights.embed_tokens.shape)}, the manifest says "
                f"{shape}"
            )
        return dataclasses.replace(weights, logits=Logits.of_config(self.manifest.target.config))

    @property
    def target_files(self) -> Path:
        """Return a local folder with the target's config and tokenizer files; for a remote store, a
        copy made once.
        """
        return self.place.kept(TARGET, self.manifest.target.weights_sha256)

    # -- arrays ------------------------------------------------------------------------------------

    def record(self, part: int) -> PartRecord:
        """Read the sealed record of part ``part`` and check it against the index's checksum."""
        with reading(self.folder(part)):
            record = read_record(self.place, self._name(part))
        if self.manifest.complete:
            _ = self.index
            if sealed(record.to_json())["crc32c"] != self._part_crc[part]:
                raise DamagedCacheError(
                    f"{self.folder(part)}: this is not the part that this store's index "
                    "was written for"
                )
        if self.manifest.format_version > 1 and record.plan_sha256 != self._digest:
            raise DamagedCacheError(
                f"{self.folder(part)}: this part belongs to another plan than the store's"
            )
        return record

    @cached_property
    def _digest(self) -> str:
        return self.manifest.digest()

    def _arrays(self, part: int) -> Mapping[str, Shard]:
        if part in self._open:
            self._open.move_to_end(part)
            return self._open[part]
        record = self.record(part)
        arrays = self._open[part] = open_part(self.place, self.layout, record)
        if len(self._open) > open_parts(len(arrays)):
            self._open.popitem(last=False)
        return arrays

    def _read(self, part: int, name: str, span: slice) -> Any:
        if self.place.remote:
            with self._opening:
                arrays = self._arrays(part)
        else:
            arrays = self._arrays(part)
        try:
            shard = arrays.get(name)
            # an array with no rows has no shard: no last state is stored in this part
            if shard is None:
                return self._empty(name)
            return shard.read(span.start, shard.spec.shape[0] if span.stop is None else span.stop)
        except DamagedCacheError as error:
            raise DamagedCacheError(f"{error}. Run dspark-tools verify {self.path}") from error

    def _empty(self, name: str) -> Any:
        found = next(s for s in self.layout.arrays(0, 0, 0) if s.name == name)
        return np.empty(found.shape, found.dtype)
