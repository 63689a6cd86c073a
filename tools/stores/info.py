"""``dspark-tools info``: describe a store from its manifest and file sizes alone. Imports no
torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from dspark.cache.settings import rotated_bits
from dspark.cache.shared.command import command, emit, json_flag, table

if TYPE_CHECKING:
    from dspark.cache.files.place import Place
    from dspark.cache.files.urls import Where
    from dspark.cache.manifest import Manifest


def info(path: str | Where) -> dict[str, Any]:
    """Return what ``--json`` prints. Counts of an unfinished store are those of its committed
    parts.
    """
    from dspark.cache.files.layout import raw_bytes_per_token
    from dspark.cache.files.place import place_of
    from dspark.cache.stored_manifest import read_manifest

    place = place_of(path)
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
        from dspark.cache.parts.committed import bytes_of, scan_parts

        records = scan_parts(path).values()
        sizes: dict[str, int] | None = bytes_of(records)
        samples, tokens = sum(r.samples for r in records), sum(r.tokens for r in records)
        supervised, last = (
            sum(r.supervised_tokens for r in records),
            sum(r.last_rows for r in records),
        )
        parts = len(records)
    else:
        sizes = stored_sizes(place)
    if sizes is None:
        sizes = found_sizes(place)
    states = sum(sizes.values())
    on_disk = states + common_bytes(place)
    target = manifest.target
    raw = raw_bytes_per_token(len(manifest.layers), target.hidden_size)
    stored = states / tokens if tokens else None
    measured = measured_bits(sizes, manifest, tokens, last)
    bits = rotated_bits(manifest.codec.name) or measured
    return {
        "path": str(place.where("")),
        "format_version": manifest.format_version,
        "complete": manifest.complete,
        "target": target.id,
        "revision": target.revision,
        "layers": manifest.layers,
        "layer_convention": manifest.layer_convention,
        "target_layer_ids": manifest.target_layer_ids,
        "num_layers": target.num_layers,
        "hidden_size": target.hidden_size,
        "vocab_size": target.vocab_size,
        "mask_token_id": target.mask_token_id,
        "samples": samples,
        "tokens": tokens,
        "supervised_tokens": supervised,
        "last_rows": last,
        "parts": parts,
        "codec": manifest.codec.name,
        "aux_bits": bits[0],
        "last_bits": bits[1],
        "aux_bits_measured": measured[0],
        "last_bits_measured": measured[1],
        "pack": manifest.codec.pack,
        "last_after_final_norm": manifest.last_after_final_norm,
        "bytes_on_disk": on_disk,
        "frozen_bytes": on_disk - states,
        "bytes_per_token": stored,
        "raw_bytes_per_token": raw,
        "ratio": raw / stored if stored else None,
        "engine": manifest.dump.engine,
        "engine_version": manifest.dump.engine_version,
        "dtype": manifest.dump.dtype,
        "seq_length": manifest.dump.seq_length,
        "mask_rule": manifest.dump.mask_rule,
        "source": manifest.source.id,
        "sources": [s.id for s in manifest.sources],
        "rows_read": counts.rows_read,
        "truncated": counts.truncated,
        "dropped": counts.dropped,
        "quality": manifest.quality,
        "per_source": sources_of(path, manifest),
    }


def sources_of(path: str | Where, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the counts of each source, if there are several, from the parts' records."""
    if len(manifest.sources) < 2:
        return []
    from dspark.cache.parts.committed import by_source, scan_parts

    return by_source(list(scan_parts(path).values()), manifest)


def stored_sizes(place: Place) -> dict[str, int] | None:
    """Return the bytes of each array over all parts from the index of a complete store; None if its
    writer did not record them.
    """
    from dspark.cache.errors import DamagedCacheError
    from dspark.cache.parts.index import read_index_record

    try:
        return read_index_record(place).bytes
    except DamagedCacheError:
        return None


def found_sizes(place: Place) -> dict[str, int]:
    """Compute the same from every object of the parts."""
    from dspark.cache.files.layout import PARTS

    out: Counter[str] = Counter()
    for name, size in place.sizes(PARTS).items():
        _, _, within = name.partition("/")
        array, _, file = within.partition("/")
        out[array if file.startswith("c/") else ""] += size
    return out


def common_bytes(place: Place) -> int:
    """Return the bytes outside the parts: manifest, calibration, the target's files and the
    index.
    """
    from dspark.cache.files.layout import CALIBRATION, INDEX, PARTS, TARGET

    single = [n for n in ("zarr.json", f"{PARTS}/zarr.json", CALIBRATION) if place.exists(n)]
    groups = [
        sum(place.sizes(n).values()) for n in (TARGET, INDEX) if place.exists(n) or place.remote
    ]
    return sum(place.size(n) for n in single) + sum(groups)


def measured_bits(
    sizes: Mapping[str, int], manifest: Manifest, tokens: int, last: int
) -> tuple[float | None, float | None]:
    """Return the bits per value of the aux layers (including exactly stored tokens) and of the last
    state on disk; None if nothing is stored.
    """
    from dspark.cache.files.layout import PLAIN_ARRAYS

    both = {True: 0, False: 0}
    for name, size in sizes.items():
        if name and name not in PLAIN_ARRAYS:
            both[name.startswith("last_")] += size
    hidden = manifest.target.hidden_size
    values = tokens * len(manifest.layers) * hidden, last * hidden
    aux = round(both[False] * 8 / values[0], 3) if values[0] else None
    return aux, round(both[True] * 8 / values[1], 3) if values[1] else None


@command("info")
@click.argument("cache")
@json_flag
def info_command(cache: str, as_json: bool) -> None:
    """Describe CACHE: target, layers, tokens, samples, bits, sizes, ratio, complete or not."""
    data = info(cache)
    if as_json:
        emit(data)
        return
    ratio = (
        f"{data['ratio']:.2f} x smaller than"
        if data["ratio"]
        else "nothing stored yet, compared with"
    )
    per_token = f"{data['bytes_per_token']:.0f}" if data["bytes_per_token"] else "-"
    table(
        [
            (
                "store",
                f"{data['path']}  (format {data['format_version']}, "
                + (
                    "complete)"
                    if data["complete"]
                    else "NOT COMPLETE: finish it with dspark-dump --resume)"
                ),
            ),
            (
                "target",
                f"{data['target']}  {data['num_layers']} layers, hidden {data['hidden_size']}, "
                f"vocabulary {data['vocab_size']}",
            ),
            (
                "aux layers",
                f"{data['layers']}  (output of layer i; vLLM's ids: {data['target_layer_ids']})",
            ),
            ("samples", f"{data['samples']:,}  in {data['parts']:,} parts"),
            (
                "tokens",
                f"{data['tokens']:,}  supervised {data['supervised_tokens']:,}, last states "
                f"{data['last_rows']:,}",
            ),
            (
                "codec",
                f"{data['codec']}, packed by {data['pack']}; measured bits per value: aux "
                f"{data['aux_bits_measured']}, last state (after the final norm) "
                f"{data['last_bits_measured']}",
            ),
            (
                "bytes",
                f"{data['bytes_on_disk']:,} on disk, of which {data['frozen_bytes']:,} are the "
                "target's frozen weights, the codec's calibration and the index",
            ),
            (
                "a token",
                f"{per_token} bytes; {ratio} the raw bf16 layout's {data['raw_bytes_per_token']}",
            ),
            (
                "engine",
                f"{data['engine']} {data['engine_version']}, {data['dtype']}, sequences up to "
                f"{data['seq_length']} tokens",
            ),
            (
                "source",
                f"{data['source']}  {data['rows_read']:,} rows read, {data['truncated']:,} cut, "
                f"dropped: {data['dropped'] or 'none'}",
            ),
            *(
                (
                    f"source {s['number']}",
                    f"{s['id']}: {s['rows']:,} rows, {s['samples']:,} samples, {s['tokens']:,} "
                    "tokens, "
                    f"dropped: {s['dropped'] or 'none'}",
                )
                for s in data["per_source"]
            ),
        ]
    )
