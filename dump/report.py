"""What a dump says at its end."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from dspark.cache.files.urls import Where
from dspark.cache.manifest import Manifest
from dspark.cache.parts.committed import by_source, scan_parts, totals

if TYPE_CHECKING:
    from dspark.dump.committing import Written


def report(output: Where, manifest: Manifest, seconds: float, written: Written) -> dict[str, Any]:
    """Return what the command prints at the end."""
    counts = manifest.counts if manifest.complete else totals(list(scan_parts(output).values()))
    return {
        "output": str(output),
        "complete": manifest.complete,
        **dataclasses.asdict(counts),
        "codec": manifest.codec.name,
        "layers": manifest.layers,
        "target_layer_ids": manifest.target_layer_ids,
        "engine": manifest.dump.engine,
        "quality": manifest.quality,
        "per_source": per_source(output, manifest),
        "seconds": round(seconds, 2),
        "new_tokens": written.tokens,
        "capture_seconds": round(written.seconds, 2),
        "stages": {name: round(seconds, 2) for name, seconds in written.stages.items()},
    }


def per_source(output: Where, manifest: Manifest) -> list[dict[str, Any]]:
    """Return the counts of each source, if there are several."""
    return (
        by_source(list(scan_parts(output).values()), manifest) if len(manifest.sources) > 1 else []
    )


def summary(out: dict[str, Any]) -> list[str]:
    """Format the report: what is stored, what was cut, what was dropped and why."""
    rate = (
        f", {out['new_tokens'] / max(out['capture_seconds'], 0.01):,.0f} per second"
        if out["new_tokens"]
        else ""
    )
    left = "" if out["complete"] else "; NOT COMPLETE: other shards have still to write their parts"
    return [
        f"{out['output']}: {out['samples']:,} samples, {out['tokens']:,} tokens "
        f"({out['supervised_tokens']:,} supervised{rate}) in "
        f"{out['parts']:,} parts; {out['truncated']:,} truncated, "
        f"{sum(out['dropped'].values()):,} of {out['rows_read']:,} rows dropped{left}",
        *(f"  dropped: {reason}: {n:,}" for reason, n in out["dropped"].items()),
        *(
            f"  source {s['number']}: {s['id']}: {s['samples']:,} samples, {s['tokens']:,} "
            f"tokens from {s['rows']:,} rows"
            for s in out["per_source"]
        ),
        f"codec    {out['codec']}" + (f" ({out['codec_why']})" if out.get("codec_why") else ""),
    ]
