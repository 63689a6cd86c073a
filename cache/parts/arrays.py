"""The arrays of a part, made from its samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from dspark.cache.codec.base import EXACT_TOKEN
from dspark.cache.files.layout import EXACT_POSITION, EXACT_ROW, EXACT_START, PartLayout
from dspark.cache.parts.shard_writer import Pieces
from dspark.cache.records import (
    KEY_BYTES,
    Array,
    CodedSample,
    TokenSample,
    joined_last_rows,
)


def assemble(
    samples: Sequence[CodedSample], layout: PartLayout
) -> tuple[dict[str, Array], dict[str, Array | Pieces]]:
    """Assemble the arrays of a part: tokens and samples joined along tokens, states as pieces."""
    small, stored = join_tokens([s.tokens for s in samples])
    states: dict[str, Array | Pieces] = {}
    for spec in layout.states(small["input_ids"].shape[0], sum(stored)):
        own, counts = layout.specs[spec.name], [len(s.tokens.input_ids) for s in samples]
        for s, n in zip(samples, counts if own.axis == "token" else stored, strict=True):
            found = s.states[spec.name]
            assert found.shape[0] == n, (
                f"row {s.tokens.row}: {spec.name} has {found.shape[0]} rows, not {n}"
            )
        pieces = [s.states[spec.name] for s in samples]
        got: Array | Pieces = Pieces(pieces) if pieces else np.empty(spec.shape, spec.dtype)
        assert (got.shape, got.dtype) == (spec.shape, np.dtype(spec.dtype)), (
            spec,
            got.shape,
            got.dtype,
        )
        states[spec.name] = got
    for name, own in layout.exact.items():
        rows = [s.states[name] for s in samples]
        states[name] = np.concatenate([np.empty((0, *own.row_shape), own.dtype), *rows])
    if layout.exact:
        at = zip(samples, small["sample_start"][:-1], strict=True)
        states[EXACT_TOKEN] = np.concatenate(
            [np.zeros(0, np.int64), *(s.states[EXACT_TOKEN] + n for s, n in at)]
        )
    return small, states


def join_tokens(tokens: Sequence[TokenSample]) -> tuple[dict[str, Array], list[int]]:
    """Return the arrays of a part that are not states, and the number of stored last states of each
    sample.
    """
    loss_mask = np.concatenate([np.zeros(0, np.bool_), *(s.loss_mask for s in tokens)])
    start = np.cumsum([0, *(s.input_ids.shape[0] for s in tokens)], dtype=np.int64)
    before = np.zeros(len(loss_mask) + 1, np.int64)
    np.cumsum(joined_last_rows(loss_mask, start), out=before[1:])
    last_start = before[start]
    return {
        "input_ids": np.concatenate([np.zeros(0, np.int32), *(s.input_ids for s in tokens)]),
        "loss_mask": loss_mask,
        "sample_start": start,
        "sample_last_start": last_start,
        "sample_row": np.array([s.row for s in tokens], dtype=np.int64),
        "sample_key": np.frombuffer(b"".join(s.key for s in tokens), dtype=np.uint8).reshape(
            -1, KEY_BYTES
        ),
        "sample_turn": np.array([s.turn for s in tokens], dtype=np.int32),
    }, np.diff(last_start).tolist()


def split_tokens(arrays: Mapping[str, Array]) -> list[TokenSample]:
    """Return the samples whose arrays ``join_tokens`` joined; views of them."""
    start, keys = arrays["sample_start"].tolist(), arrays["sample_key"].tobytes()
    ids, mask = arrays["input_ids"], arrays["loss_mask"]
    named = zip(arrays["sample_row"].tolist(), arrays["sample_turn"].tolist(), strict=True)
    return [
        TokenSample(
            row,
            keys[i * KEY_BYTES : (i + 1) * KEY_BYTES],
            ids[start[i] : start[i + 1]],
            mask[start[i] : start[i + 1]],
            turn,
        )
        for i, (row, turn) in enumerate(named)
    ]


def tokens_sha256(arrays: Mapping[str, Array]) -> str:
    """Return the sha256 over the arrays of a part that are not states, sorted by name, each with
    its name: ids, masks, and where samples begin and come from.
    """
    out = hashlib.sha256()
    for name in sorted(arrays):
        out.update(name.encode() + b"\0" + np.ascontiguousarray(arrays[name]).tobytes())
    return out.hexdigest()


def store_once(states: Mapping[str, Array], sample_start: Array) -> dict[str, Array]:
    """Store exact tokens as a part keeps them: equal rows once, in order of first occurrence.
    ``states``: ascending ``EXACT_TOKEN`` [X], and arrays of X rows. Returns the arrays with only
    the distinct rows; and, per sample, where its exact tokens begin, and per exact token its
    position within the sample and its row.
    """
    token = states[EXACT_TOKEN].astype(np.int64)
    rows = {n: a for n, a in states.items() if n != EXACT_TOKEN}
    number: dict[bytes, int] = {}
    row = np.zeros(len(token), np.int32)
    first: list[int] = []
    for i in range(len(token)):
        key = b"".join(np.ascontiguousarray(a[i]).tobytes() for a in rows.values())
        if key not in number:
            number[key] = len(first)
            first.append(i)
        row[i] = number[key]
    start = np.searchsorted(token, sample_start).astype(np.int64)
    sample = np.searchsorted(sample_start, token, side="right") - 1
    position = (token - sample_start[sample]).astype(np.int32) if len(token) else row
    return {n: a[first] for n, a in rows.items()} | {
        EXACT_START: start,
        EXACT_POSITION: position,
        EXACT_ROW: row,
    }
