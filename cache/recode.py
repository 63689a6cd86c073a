"""``dspark-tools recode``: a store in other bits. Part by part, so it streams, can be stopped, and is resumed like a dump.

Parts keep their boundaries, rows and counts; only ``aux_*`` and ``last_*`` change, and where a field's bits stay, its codes do (``--pack`` alone
loses nothing). The compact codecs are centred on states spread over the
source, a pure function of it, so a resumed run codes exactly as the first one did. Parts are independent: ``workers`` threads take one each
(decompression, coding and compression all leave Python's lock), and the bytes do not depend on how many there are.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dspark.cache.codec.centre import CALIBRATION, spread, thin
from dspark.cache.codec.rotated import Codec, calibrated, codec_for, field_info, to_numpy
from dspark.cache.errors import UsageError
from dspark.cache.files.layout import PARTS, part_name
from dspark.cache.files.part import read_record
from dspark.cache.manifest import Counts, Manifest
from dspark.cache.reader import Cache
from dspark.cache.reader import open as open_store
from dspark.cache.records import CodedSample
from dspark.cache.settings import DEFAULT_PACKING
from dspark.cache.target.files import small_files
from dspark.cache.writer import StoreWriter

BATCH_VALUES = 1 << 24  # aux values coded at once: 64 MB in float32, a few times over while they are


def recode(
    source: str | Path,
    destination: str | Path,
    *,
    aux_bits: int,
    last_bits: int,
    pack: str = DEFAULT_PACKING,
    calibrate: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write ``source`` to ``destination`` with other bits or another ``pack``; returns the finished manifest. ``progress(parts done, parts)``.

    ``workers``: parts in work at once (None: a core each, eight at most; each holds a part's states). ``device``: where states are coded.
    """
    cache = open_store(source)
    if Path(source).resolve() == Path(destination).resolve():
        raise UsageError(f"{destination} is the source itself; give another folder")
    probe = spread_states(cache)
    aux, last = (
        _new_codec(old, bits, pack, states if calibrate else None)
        for old, bits, states in zip(
            (cache.aux_codec, cache.last_codec), (aux_bits, last_bits), probe, strict=True
        )
    )
    manifest = dataclasses.replace(
        cache.manifest,
        aux=field_info(aux),
        last=field_info(last),
        counts=Counts(),
        complete=False,
        quality={},
    )
    files = small_files(cache.path, cache.manifest)
    if resume and Path(destination).exists():
        writer = StoreWriter.resume(destination, manifest)
        writer.restore_target(cache.target, files)
    else:
        writer = StoreWriter.create(destination, manifest, cache.target, files, overwrite=overwrite)
    dropped: Counter[str] = Counter(cache.manifest.counts.dropped)
    truncated = cache.manifest.counts.truncated
    for part in range(cache.parts):
        record = read_record(cache.path / PARTS / part_name(part))
        dropped.subtract(record.dropped)
        truncated -= record.truncated
    left = [part for part in range(cache.parts) if part not in writer.committed]
    with writer:
        _recode_parts(cache, writer, left, workers, torch.device(device), progress)
        # What the source dropped after its last part belongs to no part.
        tail = {reason: n for reason, n in dropped.items() if n}
        same = _same_codes(cache.aux_codec, aux) and _same_codes(cache.last_codec, last)
        quality = cache.manifest.quality if same else _quality(cache, (aux, last), probe)
        rows_read = cache.manifest.counts.rows_read
        return writer.finish(rows_read=rows_read, dropped=tail, truncated=truncated, quality=quality)


def _new_codec(old: Codec, bits: int, pack: str, states: torch.Tensor | None) -> Codec:
    """What a field coded by ``old`` is coded with: as it is where the bits stay, else centred on ``states`` if given."""
    if old.bits == bits:
        codec_for(bits, pack)  # refuses what does not go together
        return dataclasses.replace(old, pack=pack)  # type: ignore[type-var]
    codec = codec_for(bits, pack)
    return codec if states is None else calibrated(codec, states)


def _same_codes(a: Codec, b: Codec) -> bool:
    """Whether ``a`` and ``b`` store the same codes, however they are packed."""
    return (a.name, a.bits, a.params) == (b.name, b.bits, b.params)


def _quality(
    cache: Cache, codecs: tuple[Codec, Codec], probe: tuple[torch.Tensor, torch.Tensor]
) -> dict[str, Any]:
    """What the new codes lose against the source, on states spread over it (None: nothing)."""

    def through(old: Codec, new: Codec, x: torch.Tensor) -> torch.Tensor:
        if _same_codes(old, new):
            return x
        coded: dict[str, Any] = new.encode(x)
        return new.decode(coded, x.shape[-1]).float()

    a, b = probe
    ours = through(cache.aux_codec, codecs[0], a)
    return {
        "tokens": int(a.shape[0]),
        "against": "source store",
        "aux_snr_db": [snr_db(a[:, j], ours[:, j]) for j in range(a.shape[1])],
        "last_snr_db": snr_db(b, through(cache.last_codec, codecs[1], b)),
    }


def _recode_parts(
    cache: Cache,
    writer: StoreWriter,
    left: list[int],
    workers: int | None,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> None:
    """Code and commit the parts ``left``, in any order."""

    def one(part: int) -> None:
        torch.set_num_threads(1)  # of this thread: parts are what runs side by side
        own = Cache(cache.path, cache.manifest)  # files of its own; a Cache belongs to one thread
        record = own.record(part)
        first = own.index["part_first_sample"]
        samples = [own.read(i) for i in range(int(first[part]), int(first[part + 1]))]
        coded = [
            out for batch in _batches(own, samples) for out in _coded(own, batch, *writer.codecs, device)
        ]
        writer.commit(
            part,
            coded,
            row_start=record.row_start,
            row_stop=record.row_stop,
            dropped=record.dropped,
            truncated=record.truncated,
        )

    done = cache.parts - len(left)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers or min(8, os.cpu_count() or 1), thread_name_prefix="recode") as pool:
        jobs = [pool.submit(one, part) for part in left]
        try:
            for job in as_completed(jobs):
                job.result()
                done += 1
                progress(done, cache.parts)
        finally:
            for job in jobs:
                job.cancel()
            torch.set_num_threads(threads)


def decoded(cache: Cache, sample: CodedSample) -> tuple[torch.Tensor, torch.Tensor]:
    """Float states of a coded sample: ``aux`` [S, L, H], ``last`` [M, H]."""
    hidden = cache.manifest.target.hidden_size
    a = cache.aux_codec.decode({n: torch.from_numpy(x) for n, x in sample.aux.items()}, hidden)
    b = cache.last_codec.decode({n: torch.from_numpy(x) for n, x in sample.last.items()}, hidden)
    return a.float(), b.float()


def spread_states(cache: Cache, budget: int = CALIBRATION) -> tuple[torch.Tensor, torch.Tensor]:
    """``aux`` and ``last`` of samples spread over the store, about ``budget`` tokens of them (or all there are)."""
    lengths = cache.lengths
    chosen = spread(len(cache), float(lengths.mean()), budget)
    pairs = [decoded(cache, cache.read(i)) for i in chosen]
    aux, last = (torch.cat([thin(pair[k], len(chosen), budget) for pair in pairs]) for k in (0, 1))
    return aux, last


def snr_db(x: torch.Tensor, y: torch.Tensor) -> float | None:
    """10 log10 (signal / error) of ``y`` against ``x``, any shape; None where they are equal."""
    signal = float(x.double().square().sum())
    error = float((x.double() - y.double()).square().sum())
    return round(10 * math.log10(signal / error), 2) if error > 0 else None


def _batches(cache: Cache, samples: list[CodedSample]) -> Iterator[list[CodedSample]]:
    """``samples`` in runs of ``BATCH_VALUES`` aux values or one sample."""
    m = cache.manifest
    batch: list[CodedSample] = []
    values = 0
    for sample in samples:
        batch.append(sample)
        values += sample.tokens.input_ids.shape[0] * len(m.layers) * m.target.hidden_size
        if values >= BATCH_VALUES:
            yield batch
            batch, values = [], 0
    if batch:
        yield batch


def _coded(
    cache: Cache, samples: list[CodedSample], aux: Codec, last: Codec, device: torch.device
) -> list[CodedSample]:
    """``samples`` in the new codes, coded as one tensor (rows are independent): a few calls instead of dozens a sample."""
    hidden = cache.manifest.target.hidden_size

    def field(old: Codec, new: Codec, coded: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if _same_codes(old, new):
            return coded
        joined = {n: torch.from_numpy(np.concatenate([c[n] for c in coded])).to(device) for n in coded[0]}
        out = to_numpy(new.encode(old.decode(joined, hidden)))
        ends = np.cumsum([next(iter(c.values())).shape[0] for c in coded])[:-1]
        pieces = {n: np.split(x, ends) for n, x in out.items()}
        return [{n: pieces[n][i] for n in pieces} for i in range(len(coded))]

    a = field(cache.aux_codec, aux, [s.aux for s in samples])
    b = field(cache.last_codec, last, [s.last for s in samples])
    return [CodedSample(s.tokens, x, y) for s, x, y in zip(samples, a, b, strict=True)]
