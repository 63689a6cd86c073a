"""End to end on one machine: corpus and target to a draft, ours against DeepSpec's own cache writer
and trainer. Seconds by stage and bytes, until its final tau.

    python bench/end_to_end.py --model MODEL --data chat.jsonl --work DIR [--peer CHECKOUT]
        [--dump "..."] [--train "..."] [--peer-flags "--steps 400"] [--every 0.1]

Ours: dspark-dump, dspark-train with a validation every ``--every`` epochs, dspark-tools score. The
peer: bench/peer_whole.py (its two scripts), and score. Stages run one after the other.

A stage that is done (its line in DIR/stages.json is there) is not done again, so a run may take
several calls. Writes NAME.json to ``--results``, our side before the peer begins: for each side
corpus_tokens, seconds_by_stage, bytes, tau; and for ours the step and the seconds at which
validation first reached the peer's final tau (null: it did not, or there is no peer). Seconds are
of whole processes, starts included.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, command, reported, scored, trained, write
from dspark.train.run.metrics_file import read_metrics

FLAGS = "--no-tensorboard --keep-checkpoints 1"
VALIDATED = re.compile(r"(\S+ \S+) step=(\d+) .*validation=True")


class Stages:
    """What each stage gave, kept in a file between calls."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if name not in self.done:
            self.done[name] = work()
            self.path.write_text(json.dumps(self.done, indent=1) + "\n")
        return self.done[name]


def reached(draft: Path, tau: float | None, began: float) -> dict[str, float | None]:
    """When validation first had ``tau``: step, and seconds after ``began`` (Unix time), from the
    times in the training's log.
    """
    rows = [row for _, row in read_metrics(draft)]
    steps = [(row["step"], row["mean_accepted_length"] or 0) for row in rows if "validation" in row]
    times = {}
    for line in (draft / "train.log").read_text().splitlines():
        told = VALIDATED.match(line)
        if told:
            moment = datetime.datetime.strptime(told[1], "%Y-%m-%d %H:%M:%S,%f")
            times[int(told[2])] = moment.timestamp() - began
    good = [step for step, found in steps if tau is not None and found >= tau]
    step = min(good, default=None)
    return {"step": step, "train_seconds": None if step is None else times[step]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--peer", type=Path, help="checkout of DeepSpec")
    parser.add_argument("--dump", default="", help="more flags of dspark-dump")
    parser.add_argument("--train", default="", help="more flags of dspark-train")
    parser.add_argument("--peer-flags", default="", help="more flags of bench/peer_whole.py")
    parser.add_argument("--every", type=float, default=0.1, help="epochs between our validations")
    parser.add_argument("--name", default="end_to_end")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    store, ours, theirs, log = (args.work / n for n in ("hs.zarr", "ours", "peer", "log.txt"))
    stage = Stages(args.work / "stages.json")

    def dump() -> dict[str, Any]:
        again = ["--resume"] if store.exists() else []
        flags = [*shlex.split(args.dump), *again]
        return command(
            "dump", "--model", args.model, "--data", args.data, "--output", store, *flags, log=log
        )

    def train() -> dict[str, Any]:
        began = time.time()
        return {"began": began, **trained(store, ours, flags, log=log)}

    def peer() -> dict[str, Any]:
        call = [str(Path(__file__).with_name("peer_whole.py")), "--deepspec", str(args.peer)]
        call += ["--model", args.model, "--store", str(store), "--data", args.data]
        call += ["--work", str(args.work), "--output", str(theirs), "--train", args.train]
        return reported([*call, *shlex.split(args.peer_flags)], log=log)

    dumped = stage("dump", dump)
    info = stage("info", lambda: command("tools", "info", store))
    flags = [*shlex.split(FLAGS), "--checkpoint-freq", args.every, *shlex.split(args.train)]
    ran = stage("train", train)
    judged = stage("score", lambda: scored(store, ours, log=log))
    tokens = info["tokens"]
    results: dict[str, Any] = {
        "ours": {
            "corpus_tokens": tokens,
            "bytes": info["bytes_on_disk"],
            "tau": judged["tau"],
            "walk": judged["walk"],
            "seconds_by_stage": {
                "dump": dumped["wall_seconds"],
                "train": ran["train_seconds"],
                "score": judged["score_seconds"],
            },
        },
        "peer": None,
    }
    hidden = ("work", "results", "model", "peer")
    said = {k: str(v) for k, v in vars(args).items() if k not in hidden}
    final = None
    if args.peer:
        write(args.name, said, results, args.results, show=False)
        done = stage("peer", peer)
        found = stage("peer_score", lambda: scored(store, theirs, log=log))
        final = found["tau"]
        results["peer"] = {
            "samples": done["samples"],
            "bytes": done["bytes"],
            "steps": done["steps"],
            "tau": final,
            "walk": found["walk"],
            "seconds_by_stage": {
                "cache": done["cache_seconds"],
                "train": done["train_seconds"],
                "score": found["score_seconds"],
            },
        }
        results["bytes_ratio"] = results["peer"]["bytes"] / results["ours"]["bytes"]
    at = reached(ours, final, ran["began"])
    results["ours_at_peers_tau"] = at
    if at["train_seconds"] is not None:
        spent = results["peer"]["seconds_by_stage"]
        needed = dumped["wall_seconds"] + at["train_seconds"]
        results["seconds_ratio"] = (spent["cache"] + spent["train"]) / needed
    write(args.name, said, results, args.results)


if __name__ == "__main__":
    main()
