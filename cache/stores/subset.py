"""``dspark-tools subset``: copy the samples of a store that meet conditions to a new store, with
the same codes under the same plan.

Its sources are new ones (the remaining rows of each source, renumbered without gaps so that parts
are full), and their ids say what was chosen. A share is drawn by conversation, as a function of its
key, so that a conversation stays on one side and the draw can be repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dspark.cache.errors import DataError, UsageError
from dspark.cache.files.layout import SOURCE_STRIDE, part_number
from dspark.cache.files.place import each_in_parallel
from dspark.cache.files.urls import Where, where
from dspark.cache.manifest import Counts, Manifest, SourceInfo
from dspark.cache.parts.record import Block
from dspark.cache.reader import Cache
from dspark.cache.reader import open as open_store
from dspark.cache.records import Array, CodedSample
from dspark.cache.stored_manifest import write_manifest
from dspark.cache.stores.merge import common_objects, new_place, refuse_existing
from dspark.cache.writer import StoreWriter

HELP = (
    "tokens<=N, tokens>=N, supervised<=N, supervised>=N, source=NUMBER|ID, rows=A-B, "
    "conversation=HEX, share=F or share=F:SEED"
)
NUMBER = re.compile(r"(tokens|supervised)(<=|>=)(\d{1,15})")
SHARE = re.compile(r"share=(0?\.\d+|0|1(?:\.0*)?)(?::(\d{1,15}))?")


@dataclass(frozen=True, slots=True)
class Samples:
    """What is known about every sample: arrays of N."""

    tokens: Array
    supervised: Array
    source: Array
    row: Array
    key: Array  # uint8[N, 16]
    names: list[str]  # of the sources

    @classmethod
    def of(cls, cache: Cache) -> Samples:
        index = cache.index
        per_part = np.diff(index["part_first_sample"])
        return cls(
            cache.lengths,
            index["sample_supervised"],
            np.repeat(index["part_number"] // SOURCE_STRIDE, per_part),
            index["sample_row"],
            index["sample_key"],
            [s.id for s in cache.manifest.sources],
        )


Condition = Callable[[Samples], Array]


def condition(text: str) -> Condition:
    """Parse one ``--where`` into a function that returns bool[N]. Raises UsageError."""
    if found := NUMBER.fullmatch(text):
        name, sign, number = found[1], found[2], int(found[3])
        return lambda s: getattr(s, name) <= number if sign == "<=" else getattr(s, name) >= number
    if found := SHARE.fullmatch(text):
        share, seed = float(found[1]), found[2] or "0"
        return lambda s: _drawn(s.key, share, seed)
    if found := re.fullmatch(r"rows=(\d+)-(\d+)", text):
        first, last = int(found[1]), int(found[2])
        return lambda s: (s.row >= first) & (s.row <= last)
    if found := re.fullmatch(r"conversation=([0-9a-f]{32})", text):
        key = np.frombuffer(bytes.fromhex(found[1]), np.uint8)
        return lambda s: (s.key == key).all(axis=1)
    if text.startswith("source=") and len(text) > 7:
        return lambda s: s.source == _source(s, text[7:])
    raise UsageError(f"--where {text}: expected one of {HELP}.")


def _source(samples: Samples, name: str) -> int:
    if name in samples.names:
        return samples.names.index(name)
    if name.isdecimal() and int(name) < len(samples.names):
        return int(name)
    given = ", ".join(f"{i} = {n}" for i, n in enumerate(samples.names))
    raise UsageError(f"--where source={name}: not a source of this store: {given}.")


def _drawn(keys: Array, share: float, seed: str) -> Array:
    def value(key: bytes) -> float:
        return int.from_bytes(hashlib.sha256(key + seed.encode()).digest()[:8], "big") / 2.0**64

    each, which = np.unique(keys, axis=0, return_inverse=True)
    chosen = np.array([value(key.tobytes()) < share for key in each], np.bool_)
    return chosen[which.reshape(-1)]


def subset(
    source: str | Where,
    out: str | Where,
    conditions: Sequence[str],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write the samples of ``source`` for which all ``conditions`` hold to the new store ``out``;
    returns its manifest.

    Raises UsageError for an invalid condition, ExistsError if ``out`` exists, DataError if no
    sample is left.
    """
    out = where(out)
    wanted = [condition(text) for text in conditions]
    refuse_existing(out)
    cache = open_store(source)
    if cache.manifest.format_version == 1:
        raise UsageError(
            f"{source}: a store of format version 1. Convert it first: dspark-tools recode "
            f"{source} NEW"
        )
    samples = Samples.of(cache)
    keep = np.ones(len(cache), np.bool_)
    for each in wanted:
        keep &= each(samples)
    chosen = np.flatnonzero(keep)
    if not chosen.size:
        raise DataError(
            f"{source}: none of its {len(cache):,} samples meets {' and '.join(conditions)}."
        )
    left = np.unique(samples.source[chosen]).tolist()
    words = " and ".join(conditions)
    manifest = dataclasses.replace(
        cache.manifest,
        sources=[
            SourceInfo(id=f"{samples.names[s]} where {words}", sha256=None, limit=None)
            for s in left
        ],
        counts=Counts(),
        complete=False,
    )
    with new_place(out, "dspark-tools subset") as place:
        names = list(common_objects(cache.place))
        each_in_parallel(place)(lambda name: place.link(cache.place, name, name), names)
        write_manifest(place, manifest)
        with StoreWriter(place.where(""), manifest, {}) as writer:
            done = 0
            for number, old in enumerate(left):
                for block, members in _blocks(
                    samples, chosen[samples.source[chosen] == old], manifest
                ):
                    _commit(writer, cache, part_number(number, block), members)
                    done += len(members)
                    progress(done, chosen.size)
            return writer.finish(quality=cache.manifest.quality)


Members = list[tuple[int, int]]  # sample, and its new row


def _blocks(samples: Samples, chosen: Array, manifest: Manifest) -> list[tuple[int, Members]]:
    """Group the chosen samples of a source by blocks of new rows; samples of one row stay
    together.
    """
    rows = np.unique(samples.row[chosen], return_inverse=True)[1].reshape(-1)
    out: dict[int, Members] = {}
    for i, row in zip(chosen.tolist(), rows.tolist(), strict=True):
        out.setdefault(row // manifest.dump.block_rows, []).append((i, row))
    return sorted(out.items())


def _commit(writer: StoreWriter, cache: Cache, number: int, members: Members) -> None:
    coded = []
    for i, row in members:
        sample = cache.read(i)
        coded.append(CodedSample(dataclasses.replace(sample.tokens, row=row), sample.states))
    length = writer.manifest.dump.seq_length
    first = number % SOURCE_STRIDE * writer.manifest.dump.block_rows
    block: Block = writer.block(
        number,
        first,
        members[-1][1] + 1,
        dropped={},
        truncated=sum(len(c.tokens.input_ids) == length for c in coded),
    )
    writer.commit(number, coded, block)
