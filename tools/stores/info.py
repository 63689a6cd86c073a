"""``dspark-tools info``: what a store is, from its manifest and file sizes alone. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dspark.cache.files.layout import PARTS, raw_bytes_per_token
from dspark.cache.reader import read_manifest
from dspark.cache.settings import rotated_name


def info(path: str | Path) -> dict[str, Any]:
    """The keys of INTERFACES ``info`` and a few more. Counts of an unfinished store are those of its committed parts."""
    path = Path(path)
    manifest = read_manifest(path)
    counts = manifest.counts
    samples, tokens, supervised, last = (
        counts.samples,
        counts.tokens,
        counts.supervised_tokens,
        counts.last_rows,
    )
    parts = counts.parts
    if not manifest.complete:
        from dspark.cache.writer import scan_parts

        records = scan_parts(path).values()
        samples, tokens = sum(r.samples for r in records), sum(r.tokens for r in records)
        supervised, last = sum(r.supervised_tokens for r in records), sum(r.last_rows for r in records)
        parts = len(records)
    on_disk = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    states = sum(f.stat().st_size for f in (path / PARTS).rglob("*") if f.is_file())
    target = manifest.target
    raw = raw_bytes_per_token(len(manifest.layers), target.hidden_size)
    stored = states / tokens if tokens else None
    return {
        "path": str(path), "format_version": manifest.format_version, "complete": manifest.complete,
        "target": target.id, "revision": target.revision, "layers": manifest.layers, "layer_convention": manifest.layer_convention,
        "target_layer_ids": manifest.target_layer_ids, "num_layers": target.num_layers, "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size, "mask_token_id": target.mask_token_id, "samples": samples, "tokens": tokens,
        "supervised_tokens": supervised, "last_rows": last, "parts": parts, "codec": rotated_name(manifest.aux.bits, manifest.last.bits),
        "aux_bits": manifest.aux.bits, "last_bits": manifest.last.bits,
        "aux_codec": manifest.aux.codec, "last_codec": manifest.last.codec, "pack": manifest.aux.pack, "last_after_final_norm": manifest.last_after_final_norm,
        "bytes_on_disk": on_disk, "frozen_bytes": on_disk - states, "bytes_per_token": stored, "raw_bytes_per_token": raw,
        "ratio": raw / stored if stored else None, "engine": manifest.dump.engine, "engine_version": manifest.dump.engine_version,
        "dtype": manifest.dump.dtype, "seq_length": manifest.dump.seq_length, "mask_rule": manifest.dump.mask_rule,
        "source": manifest.source.id, "rows_read": counts.rows_read, "truncated": counts.truncated, "dropped": counts.dropped,
        "quality": manifest.quality,
    }  # fmt: skip
