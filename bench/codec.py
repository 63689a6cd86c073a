"""What a setting of bits does to the draft: recode one 16-bit store, train the same seeds on each,
score on the exact states.

    python bench/codec.py --store hs-16-16.zarr --work DIR [--settings 16/16,4/4,3/4,2/4]
        [--seeds 0,1] [--parallel 4]
        [--recode "--device cuda"] [--train "--max-steps 1500 --num-layers 3"] [--score
        "--max-anchors 512"] [--append]

Every draft of a seed sees the same order and anchors. Held-out tau is always that of the 16-bit
store's held-out prompts. ``--parallel`` runs that many recodings, then that many trainings, at
once: a small draft leaves most of a GPU idle. A setting whose store is in DIR already is not
recoded again, a draft that is there is trained anew. ``--append`` adds to the results that are
there (more seeds, more settings) instead of replacing them. Each command's stderr goes to a file in
DIR. Writes bench/results/codec.json after every training, so that a run cut short leaves what it
measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from common import RESULTS, command, scored, trained, write

Row = dict[str, Any]
PER_SEED = ("seeds", "tau", "accept_rate", "train_seconds", "score_seconds", "tokens_per_s")


class Bench:
    """The stores, the jobs and the table of one run."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.rows: dict[str, Row] = {}
        self.lock = threading.Lock()
        before = args.results / f"{args.name}.json"
        if args.append and before.exists():
            self.rows = {row["name"]: row for row in json.loads(before.read_text())["results"]}

    def store(self, setting: str) -> Path:
        """The store of ``setting``; recoded if it is not there."""
        if setting == "16/16":
            return self.args.store
        aux, last = setting.split("/")
        path: Path = self.args.work / f"{aux}-{last}.zarr"
        if not (path.exists() and command("tools", "info", path)["complete"]):
            how = "--resume" if path.exists() else "--overwrite"
            bits = ("--aux-bits", aux, "--last-bits", last)
            flags = shlex.split(self.args.recode)
            command(
                "tools",
                "recode",
                self.args.store,
                path,
                *bits,
                how,
                *flags,
                log=path.with_suffix(".log"),
            )
        return path

    def begin(self, setting: str) -> None:
        """The setting's row, without drafts yet."""
        info = command("tools", "info", self.store(setting))
        fresh = {
            "aux_bits": info["aux_bits"],
            "last_bits": info["last_bits"],
            "name": setting,
            "ratio": info["ratio"],
            "bytes_per_token": info["bytes_per_token"],
            "snr_db": info["quality"].get("aux_snr_db"),
            "last_snr_db": info["quality"].get("last_snr_db"),
            **{key: [] for key in PER_SEED},
        }
        with self.lock:
            self.rows.setdefault(setting, fresh)

    def draft(self, setting: str, seed: int) -> None:
        """Train and score one draft; adds it to the table."""
        name = f"draft-{setting.replace('/', '-')}-{seed}"
        draft: Path = self.args.work / name
        log = self.args.work / f"{name}.log"
        flags = ["--seed", seed, *shlex.split(self.args.train)]
        done = trained(self.store(setting), draft, flags, log=log)
        done |= scored(self.args.store, draft, shlex.split(self.args.score), log=log) | {
            "seeds": seed
        }
        if not self.args.keep:
            shutil.rmtree(draft)
        found = tuple(done[key] for key in PER_SEED)
        with self.lock:
            row = self.rows[setting]
            if seed in row["seeds"]:
                at = row["seeds"].index(seed)
                for key, value in zip(PER_SEED, found, strict=True):
                    row[key][at] = value
            else:
                for key, value in zip(PER_SEED, found, strict=True):
                    row[key].append(value)
            self.write()

    def write(self) -> None:
        """The table so far. ``tau_change``: mean tau against 16/16's over the seeds that both
        have.
        """
        exact = self.rows.get("16/16", {"seeds": [], "tau": []})
        base = dict(zip(exact["seeds"], exact["tau"], strict=True))
        for row in self.rows.values():
            pairs = [
                (t, base[s]) for s, t in zip(row["seeds"], row["tau"], strict=True) if s in base
            ]
            row["tau_change"] = (
                sum(t for t, _ in pairs) / sum(b for _, b in pairs) - 1 if pairs else None
            )
        config = {
            k: str(v)
            for k, v in vars(self.args).items()
            if k not in ("work", "results", "store", "keep")
        }
        rows = sorted(self.rows.values(), key=lambda r: (-r["aux_bits"], -r["last_bits"]))
        write(self.args.name, config, rows, self.args.results)

    def run(self) -> None:
        settings, seeds = (
            self.args.settings.split(","),
            [int(s) for s in self.args.seeds.split(",")],
        )
        # Seeds outside, so that a run cut short has every setting once rather than one setting with
        # every seed.
        jobs = [(setting, seed) for seed in seeds for setting in settings]
        os.environ.setdefault(
            "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.args.parallel))
        )
        with ThreadPoolExecutor(self.args.parallel) as pool:
            for done in as_completed([pool.submit(self.begin, s) for s in settings]):
                done.result()
            drafts = [pool.submit(self.draft, *job) for job in jobs]
            for done in as_completed(drafts):
                done.result()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", required=True, type=Path, help="16-bit store")
    parser.add_argument(
        "--work", required=True, type=Path, help="folder for stores, drafts and logs"
    )
    parser.add_argument("--settings", default="16/16,4/4,3/4,2/4", help="aux/last, comma separated")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--parallel", type=int, default=1, help="commands at once")
    parser.add_argument("--recode", default="", help="more flags of dspark-tools recode")
    parser.add_argument("--train", default="", help="more flags of dspark-train")
    parser.add_argument("--score", default="", help="more flags of dspark-tools score")
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the drafts")
    parser.add_argument("--name", default="codec")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    Bench(args).run()


if __name__ == "__main__":
    main()
