"""Reading random stretches of 1,024 tokens: MB/s of decoded states by workers, beside plain mmap of the same states in the same run.

    python bench/read.py [--hidden 1536] [--layers 5] [--tokens 100000] [--bits 16/16,4/4] [--workers 1,2,4] [--reads 400] [--work DIR]

A store of random states with samples of 1,024 tokens is written, and the codes of the same tokens as one flat file (what an uncompressed, unchecked
format would hold). Workers are processes, as a loader's are. ``mb_per_s`` counts the bytes that a read hands over: the codes of ids, mask, aux and
last, after decompression and checksums. ``zarr_mb_per_s`` is the same array read with zarr-python, ``zarrs_mb_per_s`` with its Rust pipeline where it
is installed. The page cache is warm in every case. Writes bench/results/read.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dspark.cache
from common import RESULTS, write
from dspark.cache.codec import codec_for, field_info, to_numpy
from dspark.cache.frozen import FrozenTarget
from dspark.cache.manifest import DumpInfo, Manifest, SourceInfo, TargetInfo, TokenizerInfo
from dspark.cache.records import CodedSample, TokenSample, last_rows
from dspark.cache.writer import StoreWriter

SAMPLE, PART_SAMPLES = 1024, 32
FIELDS = ("input_ids", "loss_mask", "aux_code", "aux_scale", "last_code", "last_scale")


def manifest(layers: int, hidden: int, bits: tuple[int, int]) -> Manifest:
    return Manifest(
        target=TargetInfo(
            id="random", revision=None, config={}, hidden_size=hidden, vocab_size=64, num_layers=layers + 1, mask_token_id=63, eos_token_ids=[],
            weights_sha256="",
        ),
        layers=list(range(layers)), aux=field_info(codec_for(bits[0])), last=field_info(codec_for(bits[1])),
        tokenizer=TokenizerInfo(sha256=None, chat_template_sha256=None), source=SourceInfo(id="random", sha256=None, limit=None),
        dump=DumpInfo(
            engine="bench", engine_version="1", dtype="bfloat16", seq_length=SAMPLE, min_supervised=2, assistant_pattern=None, mask_rule="given",
            part_tokens=SAMPLE * PART_SAMPLES,
        ),
    )  # fmt: skip


def build(folder: Path, layers: int, hidden: int, bits: tuple[int, int], samples: int) -> None:
    """The store ``folder/hs.zarr`` and the flat files ``folder/flat/FIELD``, of the same samples."""
    m = manifest(layers, hidden, bits)
    flat = folder / "flat"
    flat.mkdir(parents=True)
    files: dict[str, Any] = {}
    frozen = FrozenTarget(torch.zeros(64, hidden), torch.ones(hidden), torch.zeros(64, hidden), False)
    deviation = 10 ** (torch.rand(layers, hidden) - 0.5)
    aux_codec, last_codec = codec_for(bits[0]), codec_for(bits[1])
    with StoreWriter.create(folder / "hs.zarr", m, frozen, {}) as writer:
        for part in range(-(-samples // PART_SAMPLES)):
            batch = []
            for i in range(part * PART_SAMPLES, min(samples, (part + 1) * PART_SAMPLES)):
                mask = np.arange(SAMPLE) >= SAMPLE // 3
                tokens = TokenSample(i, i.to_bytes(16, "little"), np.full(SAMPLE, i % 64, np.int32), mask)
                rows = int(last_rows(mask).sum())
                aux = to_numpy(aux_codec.encode((torch.randn(SAMPLE, layers, hidden) * deviation).bfloat16()))
                last = to_numpy(last_codec.encode(torch.randn(rows, hidden).bfloat16()))
                batch.append(CodedSample(tokens, aux, last))
                arrays = {"input_ids": tokens.input_ids, "loss_mask": tokens.loss_mask}
                arrays |= {f"aux_{n}": x for n, x in aux.items()} | {f"last_{n}": x for n, x in last.items()}
                for name, x in arrays.items():
                    files.setdefault(name, open(flat / name, "wb")).write(x.tobytes())  # noqa: SIM115 - closed below
            rows_of = {"row_start": batch[0].tokens.row, "row_stop": batch[-1].tokens.row + 1}
            writer.commit(part, batch, **rows_of, dropped={}, truncated=0)
        writer.finish(rows_read=samples)
    for file in files.values():
        file.close()


def ours(folder: Path) -> Callable[[int], int]:
    cache = dspark.cache.open(folder / "hs.zarr")

    def read(i: int) -> int:
        sample = cache.read(i)
        arrays = [
            sample.tokens.input_ids,
            sample.tokens.loss_mask,
            *sample.aux.values(),
            *sample.last.values(),
        ]
        return sum(a.nbytes for a in arrays)

    return read


def mapped(folder: Path) -> Callable[[int], int]:
    """The same bytes out of flat memory-mapped files, copied (a page that is not touched is not read)."""
    cache = dspark.cache.open(folder / "hs.zarr")
    samples = len(cache)
    maps = {
        p.name: np.memmap(p, np.uint8, mode="r").reshape(samples, -1) for p in (folder / "flat").iterdir()
    }

    def read(i: int) -> int:
        return sum(np.array(x[i]).nbytes for x in maps.values())

    return read


def zarr_python(folder: Path) -> Callable[[int], int]:
    """aux_code alone, through zarr-python's own reader (with the pipeline that is configured)."""
    import zarr

    parts = sorted((folder / "hs.zarr" / "parts").glob("[0-9]*"))
    arrays: list[Any] = [zarr.open_group(p, mode="r")["aux_code"] for p in parts]

    def read(i: int) -> int:
        at = (i % PART_SAMPLES) * SAMPLE
        return int(np.asarray(arrays[i // PART_SAMPLES][at : at + SAMPLE]).nbytes)

    return read


def zarrs(folder: Path) -> Callable[[int], int]:
    import zarr

    zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
    return zarr_python(folder)


READERS = {"": ours, "mmap_": mapped, "zarr_": zarr_python, "zarrs_": zarrs}


def work(kind: str, folder: Path, seed: int, reads: int, samples: int, ready: Any, queue: Any) -> None:
    """One worker: random samples, then (bytes, start, stop) into ``queue``."""
    torch.set_num_threads(1)
    read = READERS[kind](folder)
    order = np.random.default_rng(seed).integers(0, samples, reads)
    for i in range(samples):  # warm: page cache, open files
        read(i)
    ready.wait()
    start = time.monotonic()
    size = sum(read(int(i)) for i in order)
    queue.put((size, start, time.monotonic()))


def rate(kind: str, folder: Path, workers: int, reads: int, samples: int) -> float:
    """MB/s of ``workers`` processes together."""
    spawn = multiprocessing.get_context("spawn")
    ready, queue = spawn.Barrier(workers), spawn.SimpleQueue()
    started = [
        spawn.Process(target=work, args=(kind, folder, w, reads, samples, ready, queue))
        for w in range(workers)
    ]
    for process in started:
        process.start()
    found = [queue.get() for _ in started]
    for process in started:
        process.join()
    return sum(f[0] for f in found) / (max(f[2] for f in found) - min(f[1] for f in found)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--bits", default="16/16,4/4", help="aux/last, comma separated")
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument("--reads", type=int, default=400, help="samples that each worker reads")
    parser.add_argument("--kinds", default=",".join(k or "ours" for k in READERS), help="which readers")
    parser.add_argument("--work", type=Path, help="folder for the stores  [default: a temporary one]")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    samples = args.tokens // SAMPLE
    kinds = ["" if k == "ours" else k for k in args.kinds.split(",")]
    results = []
    for setting in args.bits.split(","):
        aux, last = map(int, setting.split("/"))
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            path = Path(folder)
            build(path, args.layers, args.hidden, (aux, last), samples)
            stored = sum(f.stat().st_size for f in (path / "hs.zarr" / "parts").rglob("*") if f.is_file())
            flat = sum(f.stat().st_size for f in (path / "flat").iterdir())
            for workers in map(int, args.workers.split(",")):
                row: dict[str, Any] = {
                    "bits": setting,
                    "workers": workers,
                    "stored_mb": round(stored / 1e6, 1),
                    "flat_mb": round(flat / 1e6, 1),
                }
                for kind in kinds:
                    try:
                        row[f"{kind}mb_per_s"] = round(rate(kind, path, workers, args.reads, samples))
                    except ImportError:
                        continue
                if {"", "mmap_"} <= set(kinds):
                    row["share_of_mmap"] = round(row["mb_per_s"] / row["mmap_mb_per_s"], 3)
                print(row, flush=True)
                results.append(row)
    config = {
        "hidden": args.hidden,
        "layers": args.layers,
        "tokens": args.tokens,
        "sample_tokens": SAMPLE,
        "reads": args.reads,
    }
    write("read", config, results, args.results)


if __name__ == "__main__":
    main()
