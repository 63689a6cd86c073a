"""Plans against what they planned: bytes and seconds that ``--dry-run`` and ``--measure`` tell, and
those of the dump itself; the time that ``dspark-train --dry-run`` tells, and the training's.

    python bench/plans.py MODEL DATA --codec rotated-4-4 --codec lossless --work FOLDER [--limit N]

A dump runs between two measurements of it, so that a machine that others use is as busy for them as
for it. ``cpu`` figures are of processor time, which others change less.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
from pathlib import Path
from typing import Any

from common import command, write
from dspark.train.run.metrics_file import read_metrics


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--codec", action="append", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--steps", type=int, default=30, help="Of the training; 0: none.")
    parser.add_argument("--train", default="--num-layers 1 --total-seq-len 512 --rows-per-step 1")
    parser.add_argument("--name", default="plans")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    found = [planned(args, codec) for codec in args.codec]
    training = trained(args, args.work / "hs.zarr") if args.steps else None
    named = {"work": None, "model": Path(args.model).name, "data": Path(args.data).name}
    write(args.name, vars(args) | named, {"dumps": found, "training": training})


def planned(args: argparse.Namespace, codec: str) -> dict[str, Any]:
    """One codec: its plans and its dump, which is left at ``hs.zarr``."""
    store, log = args.work / "hs.zarr", args.work / "log"
    shutil.rmtree(store, ignore_errors=True)
    flags = ["--model", args.model, "--data", args.data, "--codec", codec, "--dtype", args.dtype]
    if args.limit:
        flags += ["--limit", args.limit]
    flags += ["--output", store]
    stated = timed("dump", *flags, "--dry-run", log=log)
    before = timed("dump", *flags, "--measure", log=log)
    made = timed("dump", *flags, log=log)
    after = timed("dump", *flags, "--measure", log=log)
    size = sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
    seconds = (before["seconds"] + after["seconds"]) / 2
    out = {
        "codec": made["codec"],
        "tokens": [before["tokens"], made["tokens"]],
        "bytes": {"stated": stated["bytes"], "measured": before["bytes"], "dump": size},
        "bytes_ratio": {"stated": stated["bytes"] / size, "measured": before["bytes"] / size},
        "seconds": {
            "stated": stated["seconds"],
            "measured": [before["seconds"], after["seconds"]],
            "dump": made["seconds"],
        },
        "seconds_ratio": seconds / made["seconds"],
        "cpu": {"measuring": before["cpu"], "dump": made["cpu"]},
    }
    print(json.dumps(out), flush=True)
    return out


def trained(args: argparse.Namespace, store: Path) -> dict[str, Any]:
    """A training of ``--steps`` steps between two dry runs of it."""
    draft, log = args.work / "draft", args.work / "log"
    shutil.rmtree(draft, ignore_errors=True)
    flags = ["--cache", store, "--output", draft, *args.train.split(), "--max-steps", args.steps]
    flags += ["--val-fraction", 0, "--log-every", 1]
    before = timed("train", *flags, "--dry-run", log=log)
    timed("train", *flags, log=log)
    after = timed("train", *flags, "--dry-run", log=log)
    rows = [row for _, row in read_metrics(draft)]
    took = sum(row["step_ms"] for row in rows if "step_ms" in row) / 1000
    told = [3600 * plan["hours"] for plan in (before, after)]
    out = {"seconds": {"told": told, "steps": took}, "seconds_ratio": sum(told) / 2 / took}
    print(json.dumps(out), flush=True)
    return out


def timed(tool: str, *flags: object, log: Path) -> dict[str, Any]:
    """``common.command`` with the processor time of the process in ``cpu``."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    out = command(tool, *flags, log=log)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return out | {"cpu": ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime}


if __name__ == "__main__":
    main()
