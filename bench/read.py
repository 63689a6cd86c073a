"""Reading random samples of 1,024 tokens: MB/s of codes by workers, beside plain mmap of the same
bytes in the same run.

    python bench/read.py [--settings 4/4:none,4/4:zstd,16/16:zstd] [--hidden 1536] [--layers 5]
        [--tokens 100000] [--workers 1,2,4] [--work DIR]

A store of random states with samples of 1,024 tokens is written (a short one before them in every
part, so that they do not begin where a chunk does), and the codes of the same samples as flat files
without checksums. Workers are processes, as a loader's are, and each holds all readers: they take
turns of ``--reads`` samples, ``--rounds`` times, the workers in step, so that what else the machine
does hits all of them alike. ``mb_per_s`` counts the bytes that a read hands over (ids, mask, aux
and last codes) after decompression and checksums; ``mmap_mb_per_s`` is ``np.array`` of slices of
the mapped flat files, the least that any reader does; ``zarr_mb_per_s`` is zarr-python on aux_code
alone. Rates are medians over the rounds, of all workers together; ``share_of_mmap`` is the median
of the rounds' shares. The page cache is warm. Writes bench/results/read.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

import dspark.cache
from common import RESULTS, write
from dspark.cache.codec import registry
from dspark.cache.codec.base import Codec, to_numpy
from dspark.cache.files.calibration import codec_info
from dspark.cache.files.layout import raw_bytes_per_token
from dspark.cache.manifest import DumpInfo, Manifest, SourceInfo, TargetInfo, TokenizerInfo
from dspark.cache.records import CodedSample, TokenSample, last_rows
from dspark.cache.settings import rotated_name
from dspark.cache.target.frozen import FrozenTarget
from dspark.cache.writer import StoreWriter

SAMPLE, PART_SAMPLES = 1024, 32
LEAD = 77  # tokens of the sample that begins a part and is not read
Reader = Callable[[int], list[Any]]  # number of a sample -> its arrays


def manifest(layers: int, hidden: int, codec: Codec) -> Manifest:
    return Manifest(
        target=TargetInfo(
            id="random",
            revision=None,
            config={},
            hidden_size=hidden,
            vocab_size=64,
            num_layers=layers + 1,
            mask_token_id=63,
            eos_token_ids=[],
            weights_sha256="",
        ),
        layers=list(range(layers)),
        codec=codec_info(codec),
        tokenizer=TokenizerInfo(sha256=None, chat_template_sha256=None),
        sources=[SourceInfo(id="random", sha256=None, limit=None)],
        dump=DumpInfo(
            engine="bench",
            engine_version="1",
            dtype="bfloat16",
            seq_length=SAMPLE,
            min_supervised=2,
            assistant_pattern=None,
            mask_rule="given",
            block_rows=PART_SAMPLES + 1,
        ),
    )


def build(folder: Path, layers: int, hidden: int, codec: Codec, samples: int) -> None:
    """The store ``folder/hs.zarr`` and the flat files ``folder/flat/FIELD``, of the same
    samples.
    """
    m = manifest(layers, hidden, codec)
    flat = folder / "flat"
    flat.mkdir(parents=True)
    files: dict[str, Any] = {}
    frozen = FrozenTarget(
        torch.zeros(64, hidden), torch.ones(hidden), torch.zeros(64, hidden), False
    )
    deviation = 10 ** (torch.rand(layers, hidden) - 0.5)
    generator = torch.Generator().manual_seed(0)

    def sample(row: int, length: int) -> CodedSample:
        mask = np.arange(length) >= length // 3
        tokens = TokenSample(
            row, row.to_bytes(16, "little"), np.full(length, row % 64, np.int32), mask
        )
        aux = torch.randn(length, layers, hidden, generator=generator) * deviation
        last = torch.randn(int(last_rows(mask).sum()), hidden, generator=generator)
        return CodedSample(tokens, to_numpy(codec.encode(aux.bfloat16(), last.bfloat16())))

    with StoreWriter.create(folder / "hs.zarr", m, frozen, {}) as writer:
        row = 0
        for part in range(-(-samples // PART_SAMPLES)):
            lengths = [LEAD] + [SAMPLE] * min(PART_SAMPLES, samples - part * PART_SAMPLES)
            batch = [sample(row + i, n) for i, n in enumerate(lengths)]
            for one in batch[1:]:
                for name, x in arrays(one).items():
                    if name not in files:
                        files[name] = open(flat / name, "wb")  # noqa: SIM115 - closed below
                    files[name].write(x.tobytes())
            writer.commit(
                part, batch, writer.block(part, row, row + len(batch), dropped={}, truncated=0)
            )
            row += len(batch)
        writer.finish()
    for file in files.values():
        file.close()


def arrays(sample: CodedSample) -> dict[str, Any]:
    """Every array of a sample, by the name it has on disk."""
    out: dict[str, Any] = {
        "input_ids": sample.tokens.input_ids,
        "loss_mask": sample.tokens.loss_mask,
    }
    return out | sample.states


def number(i: int) -> int:
    """Number in the store of the ``i``-th sample of 1,024 tokens."""
    return i + i // PART_SAMPLES + 1


def ours(folder: Path) -> Reader:
    cache = dspark.cache.open(folder / "hs.zarr")
    return lambda i: list(arrays(cache.read(number(i))).values())


def mapped(folder: Path) -> Reader:
    """The same bytes out of flat memory-mapped files, copied (a page that is not touched is not
    read).
    """
    samples = (folder / "flat" / "loss_mask").stat().st_size // SAMPLE
    maps = [
        np.memmap(folder / "flat" / n, np.uint8, "r").reshape(samples, -1)
        for n in flat_names(folder)
    ]
    return lambda i: [np.array(x[i]) for x in maps]


def flat_names(folder: Path) -> list[str]:
    return sorted(p.name for p in (folder / "flat").iterdir())


def zarr_python(folder: Path) -> Reader:
    """aux_code alone, through zarr-python's own reader."""
    import zarr

    parts = sorted((folder / "hs.zarr" / "parts").glob("[0-9]*"))
    stored: list[Any] = [zarr.open_group(p, mode="r")["aux_code"] for p in parts]

    def read(i: int) -> list[Any]:
        at = LEAD + (i % PART_SAMPLES) * SAMPLE
        return [np.asarray(stored[i // PART_SAMPLES][at : at + SAMPLE])]

    return read


READERS: dict[str, Callable[[Path], Reader]] = {"": ours, "mmap_": mapped, "zarr_": zarr_python}


def work(
    folder: Path,
    kinds: list[str],
    seed: int,
    reads: int,
    rounds: int,
    samples: int,
    ready: Any,
    queue: Any,
) -> None:
    """One worker: the readers by turns; (reader, round, bytes, start, stop) of each turn into
    ``queue``.
    """
    torch.set_num_threads(1)
    readers = {kind: READERS[kind](folder) for kind in kinds}
    order = np.random.default_rng(seed).integers(0, samples, (rounds, reads)).tolist()
    for i in range(samples):  # warm: page cache, open files
        for read in readers.values():
            read(i)
    turns = []
    for turn in range(rounds):
        for kind, read in readers.items():
            ready.wait()
            start, size = time.monotonic(), 0
            for i in order[turn]:
                for x in read(i):
                    size += x.nbytes
            turns.append((kind, turn, size, start, time.monotonic()))
    queue.put(turns)


def rates(
    folder: Path, kinds: list[str], workers: int, reads: int, rounds: int, samples: int
) -> dict[str, list[float]]:
    """MB/s of ``workers`` processes together, by reader and round."""
    spawn = multiprocessing.get_context("spawn")
    ready, queue = spawn.Barrier(workers), spawn.SimpleQueue()
    args = (reads, rounds, samples, ready, queue)
    started = [spawn.Process(target=work, args=(folder, kinds, w, *args)) for w in range(workers)]
    for process in started:
        process.start()
    found = [turn for _ in started for turn in queue.get()]
    for process in started:
        process.join()
    out: dict[str, list[float]] = {}
    for kind in kinds:
        for turn in range(rounds):
            mine = [f[2:] for f in found if f[:2] == (kind, turn)]
            seconds = max(m[2] for m in mine) - min(m[1] for m in mine)
            out.setdefault(kind, []).append(sum(m[0] for m in mine) / seconds / 1e6)
    return out


def same_bytes(folder: Path, samples: int) -> None:
    """Stop unless our reader gives what the flat files hold."""
    cache, flat, names = dspark.cache.open(folder / "hs.zarr"), mapped(folder), flat_names(folder)
    for i in range(0, samples, 7):
        mine = arrays(cache.read(number(i)))
        assert sorted(mine) == names
        assert all(mine[n].tobytes() == x.tobytes() for n, x in zip(names, flat(i), strict=True)), i


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--settings", default="4/4:none,4/4:zstd,16/16:zstd", help="aux/last:pack, ..."
    )
    parser.add_argument("--hidden", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--workers", default="1,2,4")
    parser.add_argument(
        "--reads", type=int, default=100, help="samples that each worker reads in a turn"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--kinds", default="ours,mmap_,zarr_", help="which readers")
    parser.add_argument(
        "--work", type=Path, help="folder for the stores  [default: a temporary one]"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    samples = args.tokens // SAMPLE
    kinds = ["" if k == "ours" else k for k in args.kinds.split(",")]
    results = []
    for setting in args.settings.split(","):
        bits, pack = setting.split(":")
        codec = registry.make(rotated_name(*map(int, bits.split("/"))), pack)
        with tempfile.TemporaryDirectory(dir=args.work) as name:
            folder = Path(name)
            build(folder, args.layers, args.hidden, codec, samples)
            same_bytes(folder, samples)
            stored = sum(
                f.stat().st_size for f in (folder / "hs.zarr" / "parts").rglob("*") if f.is_file()
            )
            tokens = dspark.cache.open(folder / "hs.zarr").manifest.counts.tokens
            for workers in map(int, args.workers.split(",")):
                found = rates(folder, kinds, workers, args.reads, args.rounds, samples)
                row: dict[str, Any] = {"bits": bits, "pack": pack, "workers": workers}
                row["ratio"] = round(
                    tokens * raw_bytes_per_token(args.layers, args.hidden) / stored, 2
                )
                row |= {f"{kind}mb_per_s": round(median(rate)) for kind, rate in found.items()}
                if {"", "mmap_"} <= set(kinds):
                    shares = sorted(x / y for x, y in zip(found[""], found["mmap_"], strict=True))
                    row["share_of_mmap"] = round(median(shares), 3)
                    row["share_quartiles"] = [
                        round(shares[len(shares) * q // 4], 3) for q in (1, 3)
                    ]
                print(row, flush=True)
                results.append(row)
    config = {
        "hidden": args.hidden,
        "layers": args.layers,
        "tokens": args.tokens,
        "sample_tokens": SAMPLE,
        "reads": args.reads,
        "rounds": args.rounds,
    }
    write("read", config, results, args.results)


if __name__ == "__main__":
    main()
