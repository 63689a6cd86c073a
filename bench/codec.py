"""What a setting of bits does to the draft: recode one 16-bit store, train the same seeds on each, score on the exact states.

    python bench/codec.py --store hs-16-16.zarr --work DIR [--settings 16/16,4/4,3/4,2/4] [--seeds 0,1] [--train "--max-steps 1500 --num-layers 3"]

Every draft of a seed sees the same order and anchors. Held-out tau is always that of the 16-bit store's held-out prompts. Writes
bench/results/codec.json.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
from pathlib import Path
from typing import Any

from common import RESULTS, command, write


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, type=Path, help="16-bit store")
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--settings", default="16/16,4/4,3/4,2/4", help="aux/last, comma separated")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--train", default="", help="more flags of dspark-train")
    parser.add_argument("--name", default="codec")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    results = []
    for setting in args.settings.split(","):
        aux, last = setting.split("/")
        store = args.store
        if setting != "16/16":
            store = args.work / f"{aux}-{last}.zarr"
            bits = ("--aux-bits", aux, "--last-bits", last)
            command(
                "tools", "recode", args.store, store, *bits, "--resume" if store.exists() else "--overwrite"
            )
        info = command("tools", "info", store)
        row: dict[str, Any] = {
            "aux_bits": info["aux_bits"], "last_bits": info["last_bits"], "name": setting, "ratio": info["ratio"],
            "bytes_per_token": info["bytes_per_token"], "snr_db": info["quality"].get("aux_snr_db"), "tau": [], "accept_rate": [], "seconds": [],
        }  # fmt: skip
        for seed in args.seeds.split(","):
            draft = args.work / f"draft-{aux}-{last}-{seed}"
            shutil.rmtree(draft, ignore_errors=True)
            trained = command(
                "train", "--cache", store, "--output", draft, "--seed", seed, *shlex.split(args.train)
            )
            score = command(
                "tools", "score", "--cache", args.store, "--draft", draft, "--split", "validation"
            )
            row["tau"].append(score["mean_accepted_length"])
            row["accept_rate"].append(score["accept_rate"])
            row["seconds"].append(trained["wall_seconds"])
        results.append(row)
        # After every setting, so that a run cut short leaves what it measured.
        write(
            args.name,
            {"settings": args.settings, "seeds": args.seeds, "train": args.train},
            results,
            args.results,
        )


if __name__ == "__main__":
    main()
