"""``dspark-tools estimate``: bytes, files and hours of a dump before it is run. Reads a config and, if given, the corpus; no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dspark.cache.errors import UsageError

FILES_A_PART = (
    2 * 8 + 1
)  # metadata and a shard for each array of a part (compact codecs: one array more a field), the part's own metadata
FILES_A_STORE = 20  # root, target, index


def estimate(
    model: str,
    *,
    data: str | None,
    samples: int | None,
    mean_tokens: float | None,
    aux_bits: int,
    last_bits: int,
    last_share: float,
    tokens_per_second: float,
) -> dict[str, Any]:
    """``samples`` x ``mean_tokens``, or the rows of ``data``. ``last_share``: stored last states / tokens where no corpus tells."""
    from dspark.cache.layout import raw_bytes_per_token
    from dspark.dump import plan as planning
    from dspark.dump.config import DumpConfig
    from dspark.dump.presets import find
    from dspark.dump.run import prepare
    from dspark.dump.target import load_target

    counted = samples is not None and mean_tokens is not None
    if counted == (data is not None):
        raise UsageError("give --samples and --mean-tokens, or --data FILE")
    if data is not None:
        plan = prepare(
            DumpConfig(model=model, data=data, output=Path("hs.zarr"), aux_bits=aux_bits, last_bits=last_bits)
        ).plan
    else:
        preset = find(model)
        shapes = preset.shapes if preset else load_target(model).shapes
        config = DumpConfig(
            model=model, data="counted", output=Path("hs.zarr"), aux_bits=aux_bits, last_bits=last_bits
        )
        plan = planning.resolve(config, preset, shapes)
        assert samples is not None
        assert mean_tokens is not None
        tokens = round(samples * mean_tokens)
        rate = planning.disk_bytes(shapes, plan.layers, aux_bits, last_bits, last_share)
    if plan.tokens is not None and plan.bytes is not None:
        samples, tokens, size = plan.rows, plan.tokens, plan.bytes
    else:
        size = round(tokens * rate) + planning.weight_bytes(plan.shapes)
    raw = tokens * raw_bytes_per_token(len(plan.layers), plan.shapes.hidden_size)
    parts = -(-tokens // plan.part_tokens)
    return {
        "model": model, "layers": list(plan.layers), "target_layer_ids": plan.target_layer_ids, "aux_bits": aux_bits, "last_bits": last_bits,
        "samples": samples, "tokens": tokens, "bytes": size, "raw_bytes": raw, "ratio": raw / size, "files": FILES_A_STORE + FILES_A_PART * parts,
        "hours": tokens / tokens_per_second / 3600, "tokens_per_second": tokens_per_second, "free_bytes": plan.free_bytes,
    }  # fmt: skip
