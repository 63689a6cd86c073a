"""``dspark-tools recode``: rewrite a store with another codec.

It works part by part, so it streams, can be stopped, and is resumed like a dump. Parts keep their
blocks of rows and their counts; only the codec's arrays change, and if a field's bits stay the
same, so do its codes (``--pack`` alone loses nothing). A store of format version 1 becomes one of
version 2. A codec is calibrated on states spread over the source, a pure function of it, so a
resumed run codes exactly as the first one did. Parts are independent: ``workers`` threads take one
each (decompression, coding and compression all release Python's lock), and the bytes do not depend
on their number.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dspark.cache.codec import registry
from dspark.cache.codec.base import Codec, join_states, split_states, to_numpy, tokens_of
from dspark.cache.codec.fields import Fields
from dspark.cache.errors import MismatchError, UsageError
from dspark.cache.files.calibration import codec_info
from dspark.cache.files.lock_files import owned
from dspark.cache.files.place import place_of
from dspark.cache.files.urls import Where, where
from dspark.cache.manifest import FORMAT_VERSION, Counts, Manifest
from dspark.cache.parts.record import Block
from dspark.cache.quality import Probe, quality, spread_states
from dspark.cache.reader import Cache
from dspark.cache.reader import open as open_store
from dspark.cache.records import CodedSample
from dspark.cache.settings import DEFAULT_PACKING, choose_codec, is_asked
from dspark.cache.shared.host_cores import cores
from dspark.cache.shared.stopping import parts_of, stoppable
from dspark.cache.target.files import small_files
from dspark.cache.writer import StoreWriter, refuse_to_replace

# aux values coded at once: 64 MB in float32, and a few times that while coding
BATCH_VALUES = 1 << 24


def recode(
    source: str | Where,
    destination: str | Where,
    *,
    codec: str | None = None,
    aux_bits: int | None = None,
    last_bits: int | None = None,
    pack: str = DEFAULT_PACKING,
    calibrate: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    break_lock: bool = False,
    workers: int | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Write ``source`` to ``destination`` with another codec or ``pack``; returns the finished
    manifest. ``progress(parts done, parts)``.

    ``codec``: a name, or ``aux_bits`` and ``last_bits`` name a rotated one. ``workers``: parts
    processed at once (None = one per core, at most eight; each holds a part's states). ``device``:
    where states are coded.
    """
    cache = open_store(source)
    if where(source) == where(destination) or (
        isinstance(a := where(source), Path)
        and isinstance(b := where(destination), Path)
        and a.resolve() == b.resolve()
    ):
        raise UsageError(f"{destination} is also the source; give another folder")
    name = choose_codec(codec, aux_bits, last_bits, pack)
    if name != cache.codec.name:
        m = cache.manifest
        asked = is_asked(codec, aux_bits, last_bits)
        shape = len(m.layers), m.target.hidden_size
        name, why = registry.suited(name, asked, m.counts.tokens, *shape)
        if why:
            say(f"codec {name}: {why}")
    wanted = registry.make(name, pack)
    safe = parts_of(where(destination), resume=resume)
    with (
        stoppable("finishing the parts in progress", safe),
        owned(where(destination), "dspark-tools recode", break_lock=break_lock) as lock,
    ):
        if not resume:  # before states are read and learnt from
            refuse_to_replace(place_of(destination), overwrite=overwrite)
        probe = spread_states(cache, wanted, device=device)
        new = _new_codec(cache.codec, wanted, probe if calibrate else None)
        if not isinstance(new, Fields) and not calibrate and wanted.needs_calibration:
            raise UsageError(f"codec {wanted.name} needs calibration: omit --no-calibrate")
        blocks = _blocks(cache)
        manifest = _planned(cache, new, blocks)
        files = small_files(cache.target_files, cache.manifest, cache.path)
        if resume and place_of(destination).exists():
            writer = StoreWriter.resume(destination, manifest)
            if not same_codes(writer.codec, new):
                raise MismatchError(
                    f"{destination}: its codec was calibrated on other states than those "
                    f"of {source}"
                )
            writer.restore_target(cache.target, files)
        else:
            writer = StoreWriter.create(
                destination, manifest, cache.target, files, codec=new, overwrite=overwrite
            )
        writer.guard = lock.check
        left = [number for number in blocks if number not in writer.committed]
        with writer:
            _recode_parts(
                cache,
                writer,
                {n: blocks[n] for n in left},
                len(blocks),
                workers,
                torch.device(device),
                progress,
            )
            measured = cache.manifest.quality
            if not same_codes(cache.codec, new):
                measured = quality(probe, new, "source store")
            return writer.finish(quality=measured)


@dataclass(frozen=True, slots=True)
class Source:
    """What a part of the new store is made of: samples of the old one (by index), and their
    block.
    """

    samples: range
    block: Block


def _blocks(cache: Cache) -> dict[int, Source]:
    """Return the parts of the new store, by number: those of the old one, or, for a store of
    version 1, its rows in blocks of about a part.
    """
    if cache.manifest.format_version == 1:
        return _blocks_of_version_1(cache)
    first = cache.index["part_first_sample"].tolist()
    out = {}
    for part in range(cache.parts):
        record = cache.record(part)
        block = Block(**{f.name: getattr(record, f.name) for f in dataclasses.fields(Block)})
        out[record.index] = Source(range(first[part], first[part + 1]), block)
    return out


def _blocks_of_version_1(cache: Cache) -> dict[int, Source]:
    """Divide the rows of a version 1 store into blocks. It did not record which rows were dropped,
    only how many per part: they count in the block in which that part begins.
    """
    records = [cache.record(part) for part in range(cache.parts)]
    counts = cache.manifest.counts
    rows = max(counts.rows_read, records[-1].row_stop)
    size = block_rows_of(cache)
    number = -(-rows // size)
    dropped = [Counter[str]() for _ in range(number)]
    truncated = [0] * number
    tail, left = Counter(counts.dropped), counts.truncated
    for record in records:
        dropped[record.row_start // size].update(record.dropped)
        truncated[record.row_start // size] += record.truncated
        tail.subtract(record.dropped)
        left -= record.truncated
    dropped[-1].update(tail)
    truncated[-1] += left
    at = np.searchsorted(cache.index["sample_row"], np.arange(number + 1) * size).tolist()
    return {
        k: Source(
            range(at[k], at[k + 1]),
            Block(
                row_start=k * size,
                row_stop=min((k + 1) * size, rows),
                dropped={reason: n for reason, n in sorted(dropped[k].items()) if n},
                truncated=truncated[k],
                source_id=cache.manifest.source.id,
                versions={"engine": cache.manifest.dump.engine_version},
            ),
        )
        for k in range(number)
    }


def block_rows_of(cache: Cache) -> int:
    """Return the rows per part; for a store of version 1, the power of two nearest to its parts'
    size.
    """
    if cache.manifest.format_version > 1:
        return cache.manifest.dump.block_rows
    power = round(math.log2(max(cache.manifest.counts.rows_read / max(cache.parts, 1), 1)))
    return 1 << max(power, 0)


def _planned(cache: Cache, codec: Codec, blocks: Mapping[int, Source]) -> Manifest:
    old = cache.manifest
    return dataclasses.replace(
        old,
        format_version=FORMAT_VERSION,
        fields=None,
        codec=codec_info(codec),
        dump=dataclasses.replace(old.dump, block_rows=block_rows_of(cache)),
        counts=Counts(),
        complete=False,
        quality={},
    )


def _new_codec(old: Codec, wanted: Codec, probe: Probe | None) -> Codec:
    """Calibrate ``wanted``: with the calibration of ``old`` if it is the same codec, else on
    ``probe``.
    """
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
    left: Mapping[int, Source],
    total: int,
    workers: int | None,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> None:
    """Code and commit the remaining parts ``left``, in any order."""

    embedding = None
    if cache.codec.needs_tokens or writer.codec.needs_tokens:
        embedding = cache.embedding_on(device)

    def one(number: int) -> None:
        torch.set_num_threads(1)  # of this thread: parts run in parallel
        own = Cache(cache.path, cache.manifest)  # files of its own; a Cache belongs to one thread
        made = left[number]
        samples = [own.read(i) for i in made.samples]
        coded = [
            out
            for batch in _batches(own, samples)
            for out in _coded(own, batch, writer.codec, device, embedding)
        ]
        writer.commit(number, coded, made.block)

    done = total - len(left)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers or min(8, cores()), thread_name_prefix="recode") as pool:
        jobs = [pool.submit(one, number) for number in left]
        try:
            for job in as_completed(jobs):
                job.result()
                done += 1
                progress(done, total)
        finally:
            for job in jobs:
                job.cancel()
            torch.set_num_threads(threads)


def _batches(cache: Cache, samples: list[CodedSample]) -> Iterator[list[CodedSample]]:
    """Split ``samples`` into runs of ``BATCH_VALUES`` aux values or one sample."""
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
    cache: Cache,
    samples: list[CodedSample],
    new: Codec,
    device: torch.device,
    embedding: torch.Tensor | None,
) -> list[CodedSample]:
    """Recode ``samples`` as one tensor (samples are independent): a few calls instead of dozens per
    sample.
    """
    old, hidden = cache.codec, cache.manifest.target.hidden_size
    if same_codes(old, new):
        return samples
    tokens = [s.tokens for s in samples]
    known = None if embedding is None else tokens_of(tokens, embedding)
    joined = {n: torch.from_numpy(x).to(device) for n, x in join_states(samples).items()}
    kept = {}
    # a field whose code stays is not recoded
    if isinstance(old, Fields) and isinstance(new, Fields):
        kept = {
            n: x.cpu().numpy()
            for f in _same_fields(old, new)
            for n, x in joined.items()
            if n.startswith(f)
        }
    out = to_numpy(new.encode(*old.decode(joined, hidden, known), known)) | kept
    return split_states(tokens, out, new.arrays(len(cache.manifest.layers), hidden))


def _same_fields(old: Fields, new: Fields) -> list[str]:
    """Return the array prefix of each field whose codes stay."""
    pairs = zip(old.each, new.each, strict=True)
    return [f"{f}_" for (f, a), (_, b) in pairs if (a.bits, a.params) == (b.bits, b.params)]
