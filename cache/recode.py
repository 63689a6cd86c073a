"""``dspark-tools recode``: a store in other bits. Part by part, so it streams, can be stopped, and is resumed like a dump.

Parts keep their boundaries, rows and counts; only ``aux_*`` and ``last_*`` change. The compact codecs are centred on the first states of the
source (``CALIBRATION`` tokens), a pure function of the source, so a resumed run codes exactly as the first one did.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dspark.cache.codec import Codec, Rotated, codec_for, field_info, to_numpy
from dspark.cache.errors import UsageError
from dspark.cache.layout import PARTS, part_name
from dspark.cache.manifest import Counts, Manifest
from dspark.cache.part import read_record
from dspark.cache.reader import Cache
from dspark.cache.reader import open as open_store
from dspark.cache.records import CodedSample
from dspark.cache.writer import StoreWriter

CALIBRATION = 8192  # tokens; 250 lose 1.7 dB, 1,000 lose 0.5 dB, 4,000 nothing measurable (docs/log.md)


def recode(
    source: str | Path,
    destination: str | Path,
    *,
    aux_bits: int,
    last_bits: int,
    calibrate: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write ``source`` to ``destination`` with other bits; returns the finished manifest. ``progress(parts done, parts)``."""
    cache = open_store(source)
    if Path(source).resolve() == Path(destination).resolve():
        raise UsageError(f"{destination} is the source itself; give another folder")
    aux, last = codec_for(aux_bits), codec_for(last_bits)
    probe = first_states(cache)
    if calibrate:
        aux, last = (_calibrated(c, x) for c, x in zip((aux, last), probe, strict=True))
    manifest = dataclasses.replace(
        cache.manifest,
        aux=field_info(aux),
        last=field_info(last),
        counts=Counts(),
        complete=False,
        quality={},
    )
    if resume and Path(destination).exists():
        writer = StoreWriter.resume(destination, manifest)
    else:
        files = {
            p.name: p.read_bytes()
            for p in cache.target_files.iterdir()
            if p.name not in ("model.safetensors", "config.json")
        }
        writer = StoreWriter.create(destination, manifest, cache.target, files, overwrite=overwrite)
    dropped: Counter[str] = Counter(cache.manifest.counts.dropped)
    truncated = cache.manifest.counts.truncated
    first = cache.index["part_first_sample"]
    with writer:
        for part in range(cache.parts):
            record = read_record(cache.path / PARTS / part_name(part))
            dropped.subtract(record.dropped)
            truncated -= record.truncated
            if part not in writer.committed:
                samples = [_coded(cache, i, aux, last) for i in range(int(first[part]), int(first[part + 1]))]
                writer.commit(
                    part,
                    samples,
                    row_start=record.row_start,
                    row_stop=record.row_stop,
                    dropped=record.dropped,
                    truncated=record.truncated,
                )
            progress(part + 1, cache.parts)
        # What the source dropped after its last part belongs to no part.
        tail = {reason: n for reason, n in dropped.items() if n}
        quality = {
            "tokens": int(probe[0].shape[0]),
            "against": "source store",
            "aux_snr_db": [
                snr_db(probe[0][:, j], _through(aux, probe[0])[:, j]) for j in range(probe[0].shape[1])
            ],
            "last_snr_db": snr_db(probe[1], _through(last, probe[1])),
        }
        rows_read = cache.manifest.counts.rows_read
        return writer.finish(rows_read=rows_read, dropped=tail, truncated=truncated, quality=quality)


def decoded(cache: Cache, sample: CodedSample) -> tuple[torch.Tensor, torch.Tensor]:
    """Float states of a coded sample: ``aux`` [S, L, H], ``last`` [M, H]."""
    hidden = cache.manifest.target.hidden_size
    a = cache.aux_codec.decode({n: torch.from_numpy(x) for n, x in sample.aux.items()}, hidden)
    b = cache.last_codec.decode({n: torch.from_numpy(x) for n, x in sample.last.items()}, hidden)
    return a.float(), b.float()


def first_states(cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
    """``aux`` and ``last`` of the first samples, ``CALIBRATION`` tokens of them (or all there are)."""
    aux, last, tokens = [], [], 0
    for i in range(len(cache)):
        a, b = decoded(cache, cache.read(i))
        aux.append(a)
        last.append(b)
        tokens += a.shape[0]
        if tokens >= CALIBRATION:
            break
    return torch.cat(aux), torch.cat(last)


def snr_db(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """10 log10 (signal / error) of ``y`` against ``x``, any shape; None where they are equal."""
    signal = float(x.double().square().sum())
    error = float((x.double() - y.double()).square().sum())
    return round(10 * math.log10(signal / error), 2) if error > 0 else None


def _calibrated(codec: Codec, states: torch.Tensor) -> Codec:
    return codec.calibrated(states) if isinstance(codec, Rotated) and states.shape[0] else codec


def _coded(cache: Cache, i: int, aux: Codec, last: Codec) -> CodedSample:
    sample = cache.read(i)
    a, b = decoded(cache, sample)
    return CodedSample(sample.tokens, to_numpy(aux.encode(a)), to_numpy(last.encode(b)))


def _through(codec: Codec, x: torch.Tensor) -> torch.Tensor:
    coded: dict[str, Any] = codec.encode(x)
    return codec.decode(coded, x.shape[-1]).float()
