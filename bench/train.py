"""Dump, train and score with the real commands; held-out tau and speed. Writes
bench/results/NAME.json (default ``train``).

python bench/train.py --model MODEL --data chat.jsonl --work DIR [--limit N] [--bits 16/16] [--train
"--epochs 6 --num-layers 3"]
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path
from typing import Any

from common import RESULTS, command, write
from dspark.train.run.metrics_file import read_metrics

KEEP = (
    "step",
    "epoch",
    "loss",
    "mean_accepted_length",
    "tokens_per_second",
    "step_ms",
    "data_wait_fraction",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--work", required=True, type=Path, help="folder for the store and the draft"
    )
    parser.add_argument("--limit", type=int)
    parser.add_argument("--bits", default="16/16", help="aux/last")
    parser.add_argument("--dump", default="", help="more flags of dspark-dump")
    parser.add_argument("--train", default="", help="more flags of dspark-train")
    parser.add_argument("--name", default="train")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    aux, last = args.bits.split("/")
    store, draft = args.work / f"hs-{aux}-{last}.zarr", args.work / args.name
    dumped: dict[str, Any] = {}
    if not store.exists():
        limit = ["--limit", args.limit] if args.limit else []
        dumped = command(
            "dump",
            "--model",
            args.model,
            "--data",
            args.data,
            "--output",
            store,
            "--aux-bits",
            aux,
            "--last-bits",
            last,
            *limit,
            *shlex.split(args.dump),
        )
    shutil.rmtree(draft, ignore_errors=True)
    trained = command("train", "--cache", store, "--output", draft, *shlex.split(args.train))
    score = command("tools", "score", "--cache", store, "--draft", draft, "--split", "validation")
    rows = [row for _, row in read_metrics(draft)]
    curve = [
        {k: r[k] for k in KEEP if k in r} | {"validation": bool(r.get("validation"))} for r in rows
    ]
    steady = [r for r in rows if "tokens_per_second" in r][2:] or rows[-1:]
    results = {
        "tau": score["mean_accepted_length"],
        "accept_rate": score["accept_rate"],
        "score": score,
        "tokens_per_s": sum(r["tokens_per_second"] for r in steady) / len(steady),
        "data_wait_fraction": sum(r["data_wait_fraction"] for r in steady) / len(steady),
        "train_seconds": trained["wall_seconds"],
        "score_seconds": score["wall_seconds"],
        "dump": dumped,
        "info": command("tools", "info", store),
        "curve": curve,
    }
    write(
        args.name,
        {k: str(v) for k, v in vars(args).items() if k not in ("work", "results", "model")},
        results,
        args.results,
    )


if __name__ == "__main__":
    main()
