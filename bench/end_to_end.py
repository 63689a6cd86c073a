"""End to end on one machine: corpus and target to a draft, ours against DeepSpec's trainer. Seconds
by stage and bytes, until its final tau.

python bench/end_to_end.py --model MODEL --data chat.jsonl --work DIR [--peer
DIR_OF_A_DEEPSPEC_CHECKOUT] [--dump "..."] [--train "..."] [--peer-train "..."]

Ours: dspark-dump, dspark-train with a validation every ``--every`` of an epoch, dspark-tools score.
The peer: bench/peer.py, which is its own network, loss and optimizer on the rows of our store, and
score. Its cache writer is not run: its bytes are what its format takes for the same tokens
(``info``: raw_bytes_per_token), and its dump is given the seconds of ours, in its favour.

A stage that is done (its folder and line in DIR/stages.json are there) is not done again, so a run
may take several calls.
Writes bench/results/NAME.json (default ``end_to_end``): for each side corpus_tokens,
seconds_by_stage, bytes, tau; and for ours the seconds and steps at which validation first reached
the peer's final tau (null: it did not, or there is no peer).
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import RESULTS, command, reported, scored, trained, write

FLAGS = "--no-tensorboard --keep-checkpoints 1"


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


def reached(draft: Path, tau: float | None, seconds: float) -> dict[str, float | None]:
    """When validation first had ``tau``: step, and seconds of a training that took ``seconds`` in
    all, validations included.
    """
    rows = [json.loads(line) for line in (draft / "metrics.jsonl").read_text().splitlines()]
    last = max(row["step"] for row in rows)
    good = [
        r["step"]
        for r in rows
        if r.get("validation") and tau is not None and (r["mean_accepted_length"] or 0) >= tau
    ]
    step = min(good, default=None)
    return {"step": step, "train_seconds": None if step is None else seconds * step / last}


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
    parser.add_argument(
        "--peer-train", default="", help="flags of the peer's training, as for dspark-train"
    )
    parser.add_argument(
        "--every", type=float, default=0.1, help="epochs between validations of ours"
    )
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

    def peer() -> dict[str, Any]:
        shutil.rmtree(theirs, ignore_errors=True)
        call = [
            str(Path(__file__).with_name("peer.py")),
            "--deepspec",
            str(args.peer),
            "--store",
            str(store),
            "--output",
            str(theirs),
        ]
        return reported([*call, "--train", f"{FLAGS} {args.peer_train}"], log=log)

    dumped = stage("dump", dump)
    info = stage("info", lambda: command("tools", "info", store))
    flags = [*shlex.split(FLAGS), "--checkpoint-freq", args.every, *shlex.split(args.train)]
    ran = stage("train", lambda: trained(store, ours, flags, log=log))
    judged = stage("score", lambda: scored(store, ours, log=log))
    tokens = info["tokens"]
    results: dict[str, Any] = {
        "ours": {
            "corpus_tokens": tokens,
            "bytes": info["bytes_on_disk"],
            "tau": judged["tau"],
            "seconds_by_stage": {
                "dump": dumped["wall_seconds"],
                "train": ran["train_seconds"],
                "score": judged["score_seconds"],
            },
        },
        "peer": None,
    }
    final = None
    if args.peer:
        done = stage("peer", peer)
        found = stage("peer_score", lambda: scored(store, theirs, log=log))
        final = found["tau"]
        results["peer"] = {
            "corpus_tokens": tokens,
            "bytes": round(tokens * info["raw_bytes_per_token"]),
            "bytes_are": "computed",
            "tau": final,
            "seconds_by_stage": {
                "dump": dumped["wall_seconds"],
                "train": done["wall_seconds"],
                "score": found["score_seconds"],
            },
            "dump_is": "ours",
        }
        results["bytes_ratio"] = results["peer"]["bytes"] / results["ours"]["bytes"]
    at = reached(ours, final, ran["train_seconds"])
    results["ours_at_peers_tau"] = at
    if at["train_seconds"] is not None:
        spent = results["peer"]["seconds_by_stage"]
        results["seconds_ratio"] = (spent["dump"] + spent["train"]) / (
            dumped["wall_seconds"] + at["train_seconds"]
        )
    hidden = ("work", "results", "model", "peer")
    write(
        args.name,
        {k: str(v) for k, v in vars(args).items() if k not in hidden},
        results,
        args.results,
    )


if __name__ == "__main__":
    main()
