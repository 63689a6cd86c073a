"""What raises a draft's tau: named variants of one training, and DeepSpec's own trainer on the same
rows, several at a time.

    python bench/quality.py --store 4-4.zarr --work DIR [--variants baseline,muon-2e-3,decay-7]
        [--seeds 0,1] [--gpus 4] [--per-gpu 2]
        [--train "..."] [--peer DIR_OF_A_DEEPSPEC_CHECKOUT] [--seconds 60] [--append]

A variant is a set of flags of dspark-train on top of ``--train``; ``--list`` names them, ``--also
'NAME=FLAGS'`` adds one. Every variant of a seed sees the same order of samples and, with as many
anchors, the same anchors; all are scored by ``dspark-tools score`` on all anchors of the held-out
prompts. The variant ``peer`` (run if ``--peer`` is given) is bench/peer.py.

Steps are equal by default. ``--seconds N`` makes time equal instead: each variant takes the steps
that fit into N seconds at the step time that the results already there say it had, so run it with
``--append`` after a run of equal steps; those rows get the suffix ``@Ns``.

Writes bench/results/quality.json after every draft, so that a run cut short leaves what it
measured; a variant that fails is a row with ``error``. ``change``: mean tau against the baseline's
over the seeds that both have. ``train_seconds`` holds the start and compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import shlex
import shutil
import statistics
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from common import PUBLISHED_LOSS, RESULTS, reported, scored, speed_of, trained, write

Row = dict[str, Any]
FLAGS = (
    "--recipe none --num-layers 3 --total-seq-len 16384 --rows-per-step 1 --max-anchors 2048 "
    "--lr 1e-3 --workers 6 --val-rows 12 --no-tensorboard "
    "--checkpoint-freq 100 --keep-checkpoints 1 --max-steps 1500 "
    f"--loss-fn '{PUBLISHED_LOSS}'"
)
BASE, PEER = "baseline", "peer"
VARIANTS = {
    BASE: "",
    "lr-5e-4": "--lr 5e-4",
    "lr-2e-3": "--lr 2e-3",
    "lr-4e-3": "--lr 4e-3",
    "muon-5e-4": "--optimizer muon --lr 5e-4",
    "muon-1e-3": "--optimizer muon",
    "muon-2e-3": "--optimizer muon --lr 2e-3",
    "muon-4e-3": "--optimizer muon --lr 4e-3",
    "beta2-0.999": "--betas 0.9 0.999",
    "muon-beta2-0.999": "--optimizer muon --lr 2e-3 --betas 0.9 0.999",
    "anchors-1024": "--max-anchors 1024",
    "anchors-4096": "--max-anchors 4096",
    "layers-2": "--num-layers 2",
    "layers-5": "--num-layers 5",
    "decay-7": "--decay 7",
    "decay-2": "--decay 2",
    "l1-only": """--loss-fn '{"l1": 1.0}'""",
    "ce-half": """--loss-fn '{"ce": 0.5, "l1": 0.5}'""",
    "confidence-0.1": "--confidence-head-alpha 0.1",
    "warmup-0.15": "--warmup-ratio 0.15",
    "rows-2": "--rows-per-step 2",
}
PER_SEED = (
    "seeds",
    "tau",
    "walk",
    "walk_sampled",
    "accept_rate",
    "steps",
    "step_ms",
    "tokens_per_s",
    "train_seconds",
    "score_seconds",
)


class Bench:
    """The variants, the GPUs they take turns on, and the table of one run."""

    def __init__(self, args: argparse.Namespace, variants: dict[str, str]) -> None:
        self.args, self.variants = args, variants
        self.rows: dict[str, Row] = {}
        self.lock = threading.Lock()
        self.places: queue.Queue[int] = queue.Queue()
        for _ in range(args.per_gpu):
            for gpu in range(max(1, args.gpus)):
                self.places.put(gpu)
        before = args.results / f"{args.name}.json"
        if args.append and before.exists():
            self.rows = {row["name"]: row for row in json.loads(before.read_text())["results"]}
        self.failed = 0

    def steps_of(self, name: str) -> list[str]:
        """The flag that makes a variant's time equal, or none."""
        if self.args.seconds is None:
            return []
        known = self.rows.get(name, {}).get("step_ms")
        if not known:
            raise SystemExit(
                f"--seconds: {self.args.name}.json has no step time of {name}; run it with equal "
                "steps first, and this with --append"
            )
        return [
            "--max-steps",
            str(max(1, round(1e3 * self.args.seconds / statistics.median(known)))),
        ]

    def draft(self, name: str, seed: int, steps: list[str]) -> None:
        """Train and score one draft on a GPU that is free; adds it to the table."""
        title = name if self.args.seconds is None else f"{name}@{self.args.seconds:g}s"
        flags = [*shlex.split(self.args.train), *shlex.split(self.variants[name]), *steps]
        draft: Path = self.args.work / f"{title}-{seed}"
        log = draft.with_name(f"{draft.name}.log")
        gpu = self.places.get()
        env = {"CUDA_VISIBLE_DEVICES": str(gpu)} if self.args.gpus else {}
        try:
            words = [*flags, "--seed", str(seed)]
            if name == PEER:
                done = peer(self.args, draft, words, log, env)
            else:
                done = trained(self.args.store, draft, words, log=log, env=env)
            done |= scored(self.args.store, draft, shlex.split(self.args.score), log=log, env=env)
            done |= {"seeds": seed, "steps": last_step(draft)}
        except SystemExit as error:
            with self.lock:
                self.failed += 1
                self.rows.setdefault(title, fresh(title, flags))["error"] = str(error)[-1500:]
                print(f"{title} seed {seed} failed: {error}", file=sys.stderr)
                self.write()
            return
        finally:
            self.places.put(gpu)
        if not self.args.keep:
            shutil.rmtree(draft)
        with self.lock:
            row = self.rows.setdefault(title, fresh(title, flags))
            row.pop("error", None)
            for key in PER_SEED:  # a table of before a figure was taken
                row.setdefault(key, [None] * len(row["seeds"]))
            at = row["seeds"].index(seed) if seed in row["seeds"] else len(row["seeds"])
            for key in PER_SEED:
                row[key][at : at + 1] = [done[key]]
            print(
                f"{title} seed {seed}: tau {done['tau']:.3f}, {done['train_seconds']:.0f} s",
                file=sys.stderr,
            )
            self.write()

    def write(self) -> None:
        """The table so far, best first."""
        for row in self.rows.values():
            base = self.rows.get(BASE + row["name"].removeprefix(row["name"].split("@")[0]))
            exact = dict(zip(base["seeds"], base["tau"], strict=True)) if base else {}
            pairs = [
                (t, exact[s]) for s, t in zip(row["seeds"], row["tau"], strict=True) if s in exact
            ]
            row["mean_tau"] = statistics.mean(row["tau"]) if row["tau"] else None
            row["change"] = (
                sum(t for t, _ in pairs) / sum(b for _, b in pairs) - 1 if pairs else None
            )
        config = {
            k: str(v)
            for k, v in vars(self.args).items()
            if k not in ("work", "results", "store", "keep", "peer")
        }
        rows = sorted(self.rows.values(), key=lambda r: -(r["mean_tau"] or 0))
        write(self.args.name, config, rows, self.args.results, show=False)

    def run(self) -> None:
        names, seeds = list(self.variants), [int(s) for s in self.args.seeds.split(",")]
        steps = {name: self.steps_of(name) for name in names}
        # Seeds outside, so that a run cut short has every variant once rather than one variant with
        # every seed; the peer takes longest.
        jobs = [(name, seed, steps[name]) for seed in seeds for name in names]
        jobs.sort(key=lambda job: job[0] != PEER)
        at_once = max(1, self.args.gpus) * self.args.per_gpu
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
        with ThreadPoolExecutor(at_once) as pool:
            for done in as_completed([pool.submit(self.draft, *job) for job in jobs]):
                done.result()
        print(table(sorted(self.rows.values(), key=lambda r: -(r["mean_tau"] or 0))))


def fresh(name: str, flags: list[str]) -> Row:
    return {"name": name, "flags": shlex.join(flags), **{key: [] for key in PER_SEED}}


def last_step(draft: Path) -> int:
    return max(
        int(json.loads(line)["step"]) for line in (draft / "metrics.jsonl").read_text().splitlines()
    )


def peer(
    args: argparse.Namespace, draft: Path, words: list[str], log: Path, env: dict[str, str]
) -> dict[str, Any]:
    """One training by bench/peer.py."""
    shutil.rmtree(draft, ignore_errors=True)
    flags = {
        "--deepspec": args.peer,
        "--store": args.store,
        "--output": draft,
        "--train": shlex.join(words),
    }
    call = [
        str(Path(__file__).with_name("peer.py")),
        *(str(word) for pair in flags.items() for word in pair),
    ]
    done = reported([*call, *shlex.split(args.peer_flags)], log=log, env=env)
    return {"train_seconds": done["wall_seconds"], **speed_of(draft)}


def table(rows: list[Row]) -> str:
    lines = [
        f"{'variant':24} {'tau':>6} {'walk':>6} {'change':>7} {'step ms':>8} {'train s':>8}  tau "
        "by seed"
    ]
    for row in rows:
        if not row["tau"]:
            lines.append(f"{row['name']:24} failed: {row.get('error', '')[-100:]!r}")
            continue
        change = f"{100 * row['change']:+.1f} %" if row["change"] is not None else ""
        means = [statistics.mean(row[key]) for key in ("step_ms", "train_seconds")]
        walks = [w for w in row.get("walk", []) if w is not None]
        walk = f"{statistics.mean(walks):6.3f}" if walks else f"{'':6}"
        taus = " ".join(
            f"{s}:{t:.3f}" for s, t in sorted(zip(row["seeds"], row["tau"], strict=True))
        )
        lines.append(
            f"{row['name']:24} {row['mean_tau']:6.3f} {walk} {change:>7} {means[0]:8.1f} "
            f"{means[1]:8.0f}  {taus}"
        )
    return "\n".join(lines)


def chosen(args: argparse.Namespace) -> dict[str, str]:
    """The variants to run, name -> flags."""
    known = {**({PEER: ""} if args.peer else {}), **VARIANTS}
    known |= dict(given.split("=", 1) for given in args.also)
    names = args.variants.split(",") if args.variants else list(known)
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no such variants: {', '.join(unknown)}; there are {', '.join(known)}")
    return {name: known[name] for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path)
    parser.add_argument("--work", type=Path, help="folder for drafts and logs")
    parser.add_argument("--variants", help="comma separated; default all")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=FLAGS")
    parser.add_argument("--list", action="store_true", help="print the variants and stop")
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--gpus", type=int, default=1, help="0: on the CPU")
    parser.add_argument("--per-gpu", type=int, default=2, help="trainings at once on each")
    parser.add_argument("--train", default=FLAGS, help=f"flags of every training [{FLAGS}]")
    parser.add_argument("--score", default="", help="more flags of dspark-tools score")
    parser.add_argument("--seconds", type=float, help="equal time instead of equal steps")
    parser.add_argument("--peer", type=Path, help="checkout of DeepSpec")
    parser.add_argument("--peer-flags", default="", help="more flags of bench/peer.py")
    parser.add_argument("--append", action="store_true", help="add to the results that are there")
    parser.add_argument("--keep", action="store_true", help="keep the drafts")
    parser.add_argument("--name", default="quality")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    variants = chosen(args)
    if args.list:
        print("\n".join(f"{name:16} {flags}" for name, flags in variants.items()))
        return
    if args.store is None or args.work is None:
        parser.error("--store and --work are needed")
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args, variants)
    bench.run()
    sys.exit(1 if bench.failed else 0)


if __name__ == "__main__":
    main()
