"""Does the GPU wait for data? The same optimizer steps streamed from a store, and on rows that lie
in the device's memory already.

python bench/feed.py --store hs.zarr [--steps 100] [--train "--num-layers 3 --total-seq-len 16384
--rows-per-step 1"]

Writes bench/results/feed.json: tokens/s of both, the share of the time in which the GPU had nothing
to do because of the readers, and what the loop's thread spends per step on the feed: getting a row
and starting its copy and decoder (``fetch_ms``), weighing its slots (``share_ms``).
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from common import RESULTS, write
from dspark.train.cli import config_of
from dspark.train.config import TrainConfig
from dspark.train.data.batch import Batch
from dspark.train.data.feed import Feed
from dspark.train.data.row import PackedRow
from dspark.train.run.setup import Run, prepare
from dspark.train.step import share, step

WARM = 8


def config(store: Path, flags: str) -> TrainConfig:
    """As ``dspark-train --cache store`` with ``flags``, recipes included; nothing is written."""
    return config_of(["--cache", str(store), "--output", "unused", *shlex.split(flags)])


def rows_of(run: Run) -> Iterator[list[PackedRow]]:
    return run.stream.steps_from(
        0, workers=run.workers, pin=run.compute.device.type == "cuda", endless=True
    )


def timed(
    run: Run, rows: Iterator[list[PackedRow]], place: Callable[[PackedRow], Batch], steps: int
) -> dict[str, float]:
    """``steps`` optimizer steps after a few that warm up."""
    feed = Feed(rows, place, run.compute.device)
    tokens, waited, started, fetching, sharing = 0, 0.0, 0.0, 0.0, 0.0
    for i in range(WARM + steps):
        if i == WARM:
            if run.compute.device.type == "cuda":
                torch.cuda.synchronize()
            tokens, waited, started = 0, feed.waited, time.perf_counter()
            fetching = sharing = 0.0
        begun = time.perf_counter()
        part = share(run, feed.take, lambda: False)
        sharing += time.perf_counter() - begun
        step(run, feed, part, 0, WARM + steps, None)
        tokens += part.tokens
        if i + 1 < WARM + steps:
            begun = time.perf_counter()
            feed.fetch()
            fetching += time.perf_counter() - begun
    if run.compute.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return {
        "tokens_per_s": tokens / seconds,
        "step_ms": 1e3 * seconds / steps,
        "data_wait_fraction": (feed.waited - waited) / seconds,
        "fetch_ms": 1e3 * fetching / steps,
        "share_ms": 1e3 * sharing / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--held", type=int, default=8, help="steps whose rows are held in memory")
    parser.add_argument("--train", default="", help="flags of dspark-train")
    parser.add_argument("--name", default="feed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    run = prepare(config(args.store, args.train))
    streamed = timed(
        run,
        rows_of(run),
        lambda r: r.place(run.cache, run.compute.device, run.compute.dtype),
        args.steps,
    )
    held = list(itertools.islice(rows_of(run), args.held))
    placed = {
        id(row): row.place(run.cache, run.compute.device, run.compute.dtype)
        for rows in held
        for row in rows
    }
    resident = timed(run, itertools.cycle(held), lambda r: placed[id(r)], args.steps)
    results: dict[str, Any] = {
        "streamed": streamed,
        "resident": resident,
        "bits": list(run.cache.codec.bits),
        "streamed_over_resident": streamed["tokens_per_s"] / resident["tokens_per_s"],
        "workers": run.workers,
    }
    write(args.name, {"steps": args.steps, "train": args.train}, results, args.results)


if __name__ == "__main__":
    main()
