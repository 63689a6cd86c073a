"""What the host does for a dump through vLLM, without vLLM: coded batches of SmolLM2's shapes go
from a worker process through the spool into parts and onto disk.

    python bench/dump_host.py [--parts 6] [--folder DIR] [--workers 2] [--name dump_host]

Alone: how fast a worker's writer hands over a batch (``hand over``; ``first`` with memory that was
never used), how fast the dump puts it into a part (``put in place``, ``first`` the same), and how
fast a process writes a whole part (``write a part``). Then everything together, as
``dump/run.py`` does it: seconds of the whole, of its stages, and of processors per process. The
rates are in GB of codes per second. Writes bench/results/NAME.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import resource
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from read import manifest

from common import write
from dspark.cache.codec import registry
from dspark.cache.files.atomic import remove
from dspark.cache.records import TokenSample, last_rows
from dspark.cache.shared.blocks import SharedBlock
from dspark.cache.target.frozen import FrozenTarget
from dspark.cache.writer import StoreWriter
from dspark.dump.corpus.parts import PartRows
from dspark.dump.engines.engine import Captured, CodedStates
from dspark.dump.engines.vllm.slots import Slots
from dspark.dump.engines.vllm.spool import (
    IDS,
    LASTS,
    TIMES,
    TOKENS,
    SpoolReader,
    hold,
    to_host,
    write_batch,
)
from dspark.dump.workers import WorkerPool
from dspark.dump.writing.filling import Filling
from dspark.dump.writing.pipeline import Pipeline
from dspark.dump.writing.writers import writers

LAYERS, HIDDEN = 5, 576
SAMPLE, PART_SAMPLES, BATCH_SAMPLES = 302, 1000, 128
DISTINCT = 4096  # rows of codes that are made; they repeat outside the reach of a chunk's zstd


def parts(count: int) -> list[PartRows]:
    rng = np.random.default_rng(0)
    out = []
    for part in range(count):
        samples = []
        for i in range(PART_SAMPLES):
            row = part * PART_SAMPLES + i
            length = int(rng.integers(SAMPLE // 2, SAMPLE * 3 // 2))
            ids = rng.integers(0, 49152, length).astype(np.int32)
            samples.append(
                TokenSample(row, row.to_bytes(16, "little"), ids, np.arange(length) > length // 5)
            )
        out.append(PartRows(part, part * PART_SAMPLES, (part + 1) * PART_SAMPLES, samples))
    return out


class Codes:
    """Rows of real codes of random states, repeated to any length."""

    def __init__(self, name: str) -> None:
        codec = registry.make(name)
        g = torch.Generator().manual_seed(0)
        aux = torch.randn(DISTINCT, LAYERS, HIDDEN, generator=g).bfloat16()
        last = torch.randn(DISTINCT, HIDDEN, generator=g).bfloat16()
        self._rows = codec.encode(aux, last)
        self._long: dict[str, torch.Tensor] = {}

    def batch(self, samples: list[TokenSample]) -> dict[str, torch.Tensor]:
        """Views, as what lies on a device."""
        tokens = [len(s.input_ids) for s in samples]
        lasts = [int(last_rows(s.loss_mask).sum()) for s in samples]
        out = {}
        for name, rows in self._rows.items():
            n = sum(lasts if name.startswith("last") else tokens)
            if name not in self._long or self._long[name].shape[0] < n:
                times = -(-2 * n // DISTINCT)
                self._long[name] = rows.repeat(times, *[1] * (rows.dim() - 1))
            out[name] = self._long[name][:n]
        return out

    @staticmethod
    def counts(samples: list[TokenSample]) -> dict[str, Any]:
        now = time.time()
        return {
            TOKENS: np.array([len(s.input_ids) for s in samples]),
            LASTS: np.array([int(last_rows(s.loss_mask).sum()) for s in samples]),
            IDS: np.concatenate([s.input_ids for s in samples]),
            TIMES: np.array([now, now, now]),
        }


class Hand:
    """The worker's end of the spool, as the connector has it."""

    def __init__(self) -> None:
        self._slots = Slots()

    def over(self, filename: str, coded: dict[str, torch.Tensor], told: dict[str, Any]) -> None:
        batch = to_host(coded, self._slots)  # stands for the device's copy, too
        told[TIMES] = np.append(told[TIMES], time.time())
        write_batch(filename, batch, {name: torch.from_numpy(a) for name, a in told.items()})


def batches(rows: list[PartRows]) -> list[list[tuple[int, int, TokenSample]]]:
    every = [(p.index, i, s) for p in rows for i, s in enumerate(p.samples)]
    return [every[i : i + BATCH_SAMPLES] for i in range(0, len(every), BATCH_SAMPLES)]


def worker(folder: str, name: str, count: int, room: Any, pipe: Any) -> None:
    """A vLLM worker: eight threads write batches as fast as the reader takes them."""
    torch.set_num_threads(1)
    codes, hand = Codes(name), Hand()
    work = [[s for _, _, s in batch] for batch in batches(parts(count))]
    codes.batch(max(work, key=lambda b: sum(len(s.input_ids) for s in b)))
    hold(folder)
    pipe.send(None)
    pipe.recv()
    before = resource.getrusage(resource.RUSAGE_SELF)
    with ThreadPoolExecutor(8) as threads:

        def one(i: int) -> None:
            hand.over(f"{folder}/{i}.batch", codes.batch(work[i]), codes.counts(work[i]))

        for i in range(len(work)):
            room.acquire()
            threads.submit(one, i)
    used = resource.getrusage(resource.RUSAGE_SELF)
    pipe.send(used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime)


class Silent:
    def tokens(self, n: int) -> None: ...
    def part(self, index: int, stop: int) -> None: ...


def store(folder: Path, name: str) -> StoreWriter:
    codec = registry.make(name)
    target = FrozenTarget(
        torch.zeros(64, HIDDEN), torch.ones(HIDDEN), torch.zeros(64, HIDDEN), False
    )
    m = manifest(LAYERS, HIDDEN, codec)
    m = dataclasses.replace(m, dump=dataclasses.replace(m.dump, block_rows=PART_SAMPLES))
    return StoreWriter.create(folder / "hs.zarr", m, target, {})


def size(tensors: dict[str, Any]) -> float:
    return sum(t.nbytes for t in tensors.values()) / 1e9


def alone(folder: Path, name: str) -> dict[str, float]:
    """GB/s of each stage with nothing beside it."""
    out: dict[str, float] = {}
    codes, hand, rows = Codes(name), Hand(), parts(1)
    work = batches(rows)
    codes.batch([s for _, _, s in work[0]] * 2)
    reader = SpoolReader(folder)
    writer = store(folder, name)
    block = SharedBlock(True)
    for turn in ("first", "again", "again"):
        given = took = put = 0.0
        for part in rows:
            b = writer.block(0, 0, PART_SAMPLES, dropped={}, truncated=0)
            job = writer.job(0, part.samples, b)
            filling = Filling(part, job, block)
            if turn == "first":
                began = time.perf_counter()
                block.populate()
                out["populate"] = block.size / 1e9 / (time.perf_counter() - began)
            for i, batch in enumerate(work):
                samples = [s for _, _, s in batch]
                coded, told = codes.batch(samples), codes.counts(samples)
                began = time.perf_counter()
                hand.over(f"{folder}/{i}", coded, told)
                given += time.perf_counter() - began
                began = time.perf_counter()
                found = reader.take(f"{folder}/{i}", range(len(samples)))
                arrays = {n: found[n].numpy() for n in coded}
                filling.put([j for _, j, _ in batch], arrays)
                put += time.perf_counter() - began
                took += size(coded)
                del found, arrays
        out[f"hand over, {turn}"], out[f"put in place, {turn}"] = took / given, took / put
    arrays = {n: block.array(r) for n, r in filling.places.items()}
    for turn in ("first", "again"):
        began, used = time.perf_counter(), os.times()
        job.write(arrays)
        out[f"write a part, {turn}"] = size(arrays) / (time.perf_counter() - began)
        now = os.times()
        out[f"write a part, {turn}, of processors"] = size(arrays) / (
            now.user + now.system - used.user - used.system
        )
        remove(folder / "hs.zarr/parts/000000000000")
    out["GB of a part"] = size(arrays)
    del arrays
    filling.release()
    block.close()
    remove(folder / "hs.zarr")
    return out


def together(folder: Path, name: str, count: int, workers: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    room = context.Semaphore(16)
    process = context.Process(target=worker, args=(str(folder), name, count, room, theirs))
    process.start()
    rows = parts(count)
    work = batches(rows)
    pool: WorkerPool | None = writers(workers)
    writer = store(folder, name)
    reader = SpoolReader(folder)
    ours.recv()
    started = 0.0
    if pool is not None:
        pool.wait_until_started()
        started = sum(map(processors, pool._processes))

    def states(i: int, numbers: list[int]) -> CodedStates:
        found = reader.take(f"{folder}/{i}.batch", numbers)
        names = list(writer.codec.arrays(LAYERS, HIDDEN))
        return CodedStates({n: found[n].numpy() for n in names}, reader.spent())

    def stream(pipeline: Pipeline) -> Iterator[Captured]:
        begun = 0
        for i, batch in enumerate(work):
            for part, group in itertools.groupby(enumerate(batch), lambda m: m[1][0]):
                while begun <= part:
                    pipeline.begin(rows[begun])
                    begun += 1
                members = list(group)
                fetch = partial(states, i, [n for n, _ in members])
                yield Captured(part, [j for _, (_, j, _) in members], fetch)
            room.release()

    began, used = time.perf_counter(), os.times()
    ours.send(None)
    with Pipeline(writer, writer.codec, pool=pool, bar=Silent()) as pipeline:
        for captured in stream(pipeline):
            pipeline.put(captured)
        pipeline.finish()
        seconds = time.perf_counter() - began
        stages = {k: round(v, 3) for k, v in pipeline.seconds.items()}
    now = os.times()
    children = now.children_user + now.children_system - used.children_user - used.children_system
    theirs_used = ours.recv()
    process.join()
    writer.finish()
    files = (f.stat() for f in (folder / "hs.zarr/parts").rglob("*"))
    codes = sum(f.st_size for f in files if stat.S_ISREG(f.st_mode))
    tokens = sum(p.tokens for p in rows)
    remove(folder / "hs.zarr")
    return {
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(tokens / seconds),
        "GB on disk": codes / 1e9,
        "stages_s": stages,
        "processor_s": {
            "dump": round(now.user + now.system - used.user - used.system, 2),
            "vLLM's worker": round(theirs_used, 2),
            "writers": round(children - started, 2),
        },
    }


def processors(pid: int) -> float:
    """Seconds of processors that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", type=int, default=6)
    parser.add_argument("--folder")
    parser.add_argument("--codec", default="rotated-4-4")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--name", default="dump_host")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        results: dict[str, Any] = {"alone_GB_per_s": alone(Path(made), args.codec)}
        results["together"] = together(Path(made), args.codec, args.parts, args.workers)
    write(args.name, {"codec": args.codec, "workers": args.workers}, results)


if __name__ == "__main__":
    main()
