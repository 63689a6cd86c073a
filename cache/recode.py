"""``dspark-tools recode``: a store in other bits. Part by part, so it streams, can be stopped, and is resumed like a dump.

Parts keep their boundaries, rows and counts; only ``aux_*`` and ``last_*`` change, and where a field's bits stay, its codes do (``--pack`` alone
loses nothing). The compact codecs are centred on states spread over the
source, a pure function of it, so a resumed run codes exactly as the first one did. Parts are independent: ``workers`` threads take one each
(decompression, coding and compression all leave Python's lock), and the bytes do not depend on how many there are.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from dspark.cache.codec import registry
from dspark.cache.codec.base import Codec, join_states, split_states, to_numpy, tokens_of
from dspark.cache.codec.fields import Fields, field_info
from dspark.cache.errors import UsageError
from dspark.cache.files.layout import PARTS, part_name
from dspark.cache.files.part import read_record
from dspark.cache.manifest import Counts, Manifest
from dspark.cache.quality import Probe, quality, spread_states
from dspark.cache.reader import Cache
from dspark.cache.reader import open as open_store
from dspark.cache.records import CodedSample
from dspark.cache.settings import DEFAULT_PACKING, choose_codec
from dspark.cache.target.files import small_files
from dspark.cache.writer import StoreWriter

BATCH_VALUES = 1 << 24  # aux values coded at once: 64 MB in float32, a few times over while they are


def recode(
    source: str | Path,
    destination: str | Path,
    *,
    codec: str | None = None,
    aux_bits: int | None = None,
    last_bits: int | None = None,
    pack: str = DEFAULT_PACKING,
    calibrate: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write ``source`` to ``destination`` with another codec or ``pack``; returns the finished manifest. ``progress(parts done, parts)``.

    ``codec``: a name, or ``aux_bits`` and ``last_bits`` name a rotated one.
    ``workers``: parts in work at once (None: a core each, eight at most; each holds a part's states). ``device``: where states are coded.
    """
    cache = open_store(source)
    if Path(source).resolve() == Path(destination).resolve():
        raise UsageError(f"{destination} is the source itself; give another folder")
    wanted = registry.make(choose_codec(codec, aux_bits, last_bits), pack)
    probe = spread_states(cache, wanted)
    new = _new_codec(cache.codec, wanted, probe if calibrate else None)
    assert isinstance(new, Fields)
    manifest = dataclasses.replace(
        cache.manifest,
        aux=field_info(new.aux),
        last=field_info(new.last),
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
        measured = cache.manifest.quality
        if not same_codes(cache.codec, new):
            measured = quality(probe, new, "source store")
        rows_read = cache.manifest.counts.rows_read
        return writer.finish(rows_read=rows_read, dropped=tail, truncated=truncated, quality=measured)


def _new_codec(old: Codec, wanted: Codec, probe: Probe | None) -> Codec:
    """``wanted``, with what ``old`` has learnt where they are the same codec, else with what ``probe`` teaches."""
    if isinstance(old, Fields) and isinstance(wanted, Fields):  # by field: one may stay as it is
        each = zip((old.aux, old.last), (wanted.aux, wanted.last), strict=True)
        learnt = wanted if probe is None else wanted.calibrated(*probe)
        aux, last = (
            dataclasses.replace(a, pack=b.pack) if a.bits == b.bits else c  # type: ignore[type-var]
            for (a, b), c in zip(each, (learnt.aux, learnt.last), strict=True)
        )
        return dataclasses.replace(wanted, aux=aux, last=last)
    if old.name == wanted.name:
        return old.repacked(wanted.pack)
    return wanted if probe is None else wanted.calibrated(*probe)


def same_codes(a: Codec, b: Codec) -> bool:
    """Tell whether ``a`` and ``b`` store the same codes, however they are packed."""
    return a.repacked(DEFAULT_PACKING) == b.repacked(DEFAULT_PACKING)


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
        coded = [out for batch in _batches(own, samples) for out in _coded(own, batch, writer.codec, device)]
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


def _coded(cache: Cache, samples: list[CodedSample], new: Codec, device: torch.device) -> list[CodedSample]:
    """``samples`` in the new codes, coded as one tensor (samples are independent): a few calls instead of dozens per sample."""
    old, hidden = cache.codec, cache.manifest.target.hidden_size
    if same_codes(old, new):
        return samples
    tokens = [s.tokens for s in samples]
    known = None
    if old.needs_tokens or new.needs_tokens:
        known = tokens_of(tokens, cache.target.embed_tokens.to(device))
    joined = {n: torch.from_numpy(x).to(device) for n, x in join_states(samples).items()}
    kept = {}
    if isinstance(old, Fields) and isinstance(new, Fields):  # a field whose code stays is not coded again
        kept = {
            n: x.cpu().numpy() for f in _same_fields(old, new) for n, x in joined.items() if n.startswith(f)
        }
    out = to_numpy(new.encode(*old.decode(joined, hidden, known), known)) | kept
    return split_states(tokens, out, new.arrays(len(cache.manifest.layers), hidden))


def _same_fields(old: Fields, new: Fields) -> list[str]:
    """Prefix of the arrays of each field whose codes stay."""
    pairs = zip(old.each, new.each, strict=True)
    return [f"{f}_" for (f, a), (_, b) in pairs if (a.bits, a.params) == (b.bits, b.params)]
