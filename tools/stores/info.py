"""``dspark-tools info``: what a store is, from its manifest and file sizes alone. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dspark.cache.settings import rotated_bits
from dspark.cache.shared.command import command, emit, json_flag, table

if TYPE_CHECKING:
    from dspark.cache.manifest import Manifest


def info(path: str | Path) -> dict[str, Any]:
    """The keys of INTERFACES ``info`` and a few more. Counts of an unfinished store are those of its committed parts."""
    from dspark.cache.files.layout import PARTS, raw_bytes_per_token
    from dspark.cache.reader import read_manifest

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
    measured = measured_bits(path, manifest, tokens, last)
    bits = rotated_bits(manifest.codec.name) or measured
    return {
        "path": str(path), "format_version": manifest.format_version, "complete": manifest.complete,
        "target": target.id, "revision": target.revision, "layers": manifest.layers, "layer_convention": manifest.layer_convention,
        "target_layer_ids": manifest.target_layer_ids, "num_layers": target.num_layers, "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size, "mask_token_id": target.mask_token_id, "samples": samples, "tokens": tokens,
        "supervised_tokens": supervised, "last_rows": last, "parts": parts, "codec": manifest.codec.name,
        "aux_bits": bits[0], "last_bits": bits[1], "aux_bits_measured": measured[0], "last_bits_measured": measured[1],
        "pack": manifest.codec.pack, "last_after_final_norm": manifest.last_after_final_norm,
        "bytes_on_disk": on_disk, "frozen_bytes": on_disk - states, "bytes_per_token": stored, "raw_bytes_per_token": raw,
        "ratio": raw / stored if stored else None, "engine": manifest.dump.engine, "engine_version": manifest.dump.engine_version,
        "dtype": manifest.dump.dtype, "seq_length": manifest.dump.seq_length, "mask_rule": manifest.dump.mask_rule,
        "source": manifest.source.id, "sources": [s.id for s in manifest.sources], "rows_read": counts.rows_read, "truncated": counts.truncated, "dropped": counts.dropped,
        "quality": manifest.quality, "per_source": sources_of(path, manifest),
    }  # fmt: skip


def sources_of(path: str | Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Counts of each source, where there are several; the parts' records have them."""
    if len(manifest.sources) < 2:
        return []
    from dspark.cache.writer import by_source, scan_parts

    return by_source(list(scan_parts(Path(path)).values()), manifest)


def measured_bits(
    path: Path, manifest: Manifest, tokens: int, last: int
) -> tuple[float | None, float | None]:
    """Bits per value of the aux layers and of the last state on disk, exactly stored tokens counted with the former; None where nothing is stored."""
    from dspark.cache.files.layout import PARTS, PLAIN_ARRAYS

    sizes = {True: 0, False: 0}
    for part in (path / PARTS).iterdir():
        for array in part.iterdir() if part.is_dir() else ():
            if array.is_dir() and array.name not in PLAIN_ARRAYS:
                shards = (f.stat().st_size for f in (array / "c").rglob("*") if f.is_file())
                sizes[array.name.startswith("last_")] += sum(shards)
    hidden = manifest.target.hidden_size
    values = tokens * len(manifest.layers) * hidden, last * hidden
    aux = round(sizes[False] * 8 / values[0], 3) if values[0] else None
    return aux, round(sizes[True] * 8 / values[1], 3) if values[1] else None


@command("info")
@click.argument("cache")
@json_flag
def info_command(cache: str, as_json: bool) -> None:
    """Print what CACHE is: target, layers, tokens, samples, bits, sizes, ratio, complete or not."""
    data = info(cache)
    if as_json:
        emit(data)
        return
    ratio = f"{data['ratio']:.2f} x smaller than" if data["ratio"] else "nothing stored yet, against"
    per_token = f"{data['bytes_per_token']:.0f}" if data["bytes_per_token"] else "-"
    table([
        ("store", f"{data['path']}  (format {data['format_version']}, {'complete' if data['complete'] else 'NOT COMPLETE: finish it with dspark-dump --resume'})"),
        ("target", f"{data['target']}  {data['num_layers']} layers, hidden {data['hidden_size']}, vocabulary {data['vocab_size']}"),
        ("aux layers", f"{data['layers']}  (output of layer i; vLLM's ids: {data['target_layer_ids']})"),
        ("samples", f"{data['samples']:,}  in {data['parts']:,} parts"),
        ("tokens", f"{data['tokens']:,}  supervised {data['supervised_tokens']:,}, last states {data['last_rows']:,}"),
        ("codec", f"{data['codec']}, packed by {data['pack']}; measured bits per value: aux {data['aux_bits_measured']}, last state (after the final norm) {data['last_bits_measured']}"),
        ("bytes", f"{data['bytes_on_disk']:,} on disk, of which {data['frozen_bytes']:,} are the target's frozen weights, the codec's calibration and the index"),
        ("a token", f"{per_token} bytes; {ratio} the raw bf16 layout's {data['raw_bytes_per_token']}"),
        ("engine", f"{data['engine']} {data['engine_version']}, {data['dtype']}, sequences up to {data['seq_length']} tokens"),
        ("source", f"{data['source']}  {data['rows_read']:,} rows read, {data['truncated']:,} cut, dropped: {data['dropped'] or 'none'}"),
        *((f"source {s['number']}", f"{s['id']}: {s['rows']:,} rows, {s['samples']:,} samples, {s['tokens']:,} tokens, dropped: {s['dropped'] or 'none'}")
          for s in data["per_source"]),
    ])  # fmt: skip
