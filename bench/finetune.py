"""Fine-tuning on one's own traffic: a draft trained on four of the corpus's sources goes on with
the fifth; walk by source, forgetting included.

    python bench/finetune.py --model DIR --data FILE.jsonl[.gz] --out FOLDER [--own bfcl-v4]
        [--sizes 200,1000,3000] [--seeds 0,1,2] [--budget 230]

One dump, one process, one compilation; rows lie on the device as codes. Per seed:

base             ``--steps`` on the four sources; judged as it is ("none": no tuning)
tuned-N          base, then ``--passes`` passes over N conversations of the fifth at ``--lr``
mixed-N the same, with rows of the four sources mixed in until they are ``--general`` of the rows,
new ones in each pass scratch-N ``--scratch`` steps on the N conversations alone, at the recipe's
rate, from random weights

then, if there is time left, ``sweep``: passes and rates of tuned-1000 with the first seed. Each
draft is judged at every anchor of held-out rows of each source: tau, greedy walk, walk at
temperature 1. FOLDER/NAME.json is written after every draft; a later call goes on with what is
missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from feed import config
from learn_lab import Held, Lab
from torch import Tensor

from common import write
from dspark.train.data.anchors import Int64
from dspark.train.data.stream import VALIDATION_EPOCH, Stream, split
from dspark.train.objective.objective import objective
from dspark.train.objective.slots import SlotInputs
from dspark.train.optim.base import Snapshot, learning_rate
from dspark.train.run.setup import Run, prepare

FLAGS = "--recipe SmolLM2-135M --no-tensorboard"
JUDGED = ("tau", "walk", "walk_sampled")
SWEEP = tuple((passes, lr) for passes in (2, 4, 8) for lr in (2e-4, 5e-4, 1e-3, 2e-3))


def dumped(args: argparse.Namespace) -> Path:
    """The store of the whole corpus, made once by the product."""
    store: Path = args.out / "corpus.zarr"
    if not (store / "index").exists():
        limit = ["--limit", str(args.limit)] if args.limit else []
        call = [
            "-m",
            "dspark.dump",
            "--model",
            args.model,
            "--data",
            args.data,
            "--output",
            str(store),
            "--codec",
            "rotated-4-4",
        ]
        call += [*limit, "--resume"] if store.exists() else limit
        subprocess.run([sys.executable, *call], check=True, stdout=sys.stderr)
    return store


def sources_of(data: str) -> list[str]:
    """The source of each row of the corpus."""
    with gzip.open(data, "rt") if data.endswith(".gz") else open(data) as lines:
        return [json.loads(line)["source"] for line in lines]


class Study(Lab):
    """Rows by source on the device, and one compiled model that every draft of the study is trained
    in.
    """

    def __init__(self, run: Run, args: argparse.Namespace) -> None:
        self.run, self.args = run, args
        self.cuda = run.compute.device.type == "cuda"
        names = np.array(sources_of(args.data))[run.cache.index["sample_row"]]
        train, held = split(run.cache.index["sample_key"], run.config.val_fraction)
        own, general = train[names[train] == args.own], train[names[train] != args.own]
        if not (own.size and general.size):
            raise SystemExit(
                f"--own {args.own}: no samples of it, or no others; sources are "
                f"{sorted(set(names))}"
            )
        self.general = list(self._rows(general, 0))
        first = np.random.default_rng(7).permutation(own)
        self.conversations = {n: min(n, own.size) for n in args.sizes}
        self.own = {n: list(self._rows(np.sort(first[:n]), 0)) for n in args.sizes}
        by_source = {str(name): held[names[held] == name] for name in np.unique(names)}
        self.judged = {
            name: list(self._rows(samples, VALIDATION_EPOCH, args.val_rows))
            for name, samples in by_source.items()
            if samples.size
        }
        blank = run.optimizer.snapshot()
        self.moments = {
            k: {n: torch.zeros_like(t) for n, t in m.items()} for k, m in blank.moments.items()
        }

    def _rows(self, samples: Int64, epoch: int, limit: int | None = None) -> Iterator[Held]:
        s = self.run.stream
        stream = Stream(
            s.cache,
            samples,
            seed=s.seed,
            total_seq_len=s.total_seq_len,
            rows_per_step=1,
            block_size=s.block_size,
            max_anchors=s.max_anchors,
            pad=s.pad,
            max_rows=limit,
        )
        for step in stream.steps_from(epoch, workers=self.run.workers):
            yield from (Held.of(row, self.run) for row in step if row.slots)

    def order(self, n: int, passes: int, seed: int, share: float) -> list[Held]:
        """``passes`` over the rows of ``n`` conversations, ``share`` of all rows drawn from the
        four sources.
        """
        draw, own, out = np.random.default_rng([seed, n]), self.own[n], list[Held]()
        others = iter(
            draw.permutation(len(self.general)).tolist()
            * (1 + passes * len(own) // len(self.general))
        )
        for _ in range(passes):
            more = round(len(own) * share / (1 - share))
            rows = [*own, *(self.general[next(others)] for _ in range(more))]
            out += [rows[i] for i in draw.permutation(len(rows))]
        return out

    def passes_over(self, rows: list[Held], steps: int, seed: int) -> Iterator[Held]:
        draw = np.random.default_rng([seed, 1])
        order: list[int] = []
        for _ in range(steps):
            order = order or draw.permutation(len(rows)).tolist()
            yield rows[order.pop()]

    def fit(self, rows: Iterable[Held], steps: int, lr: float) -> float:
        """One step per row from the weights that are there, no moments; seconds."""
        run = self.run
        self.sync()
        started = time.perf_counter()
        for i, held in enumerate(rows):
            batch = held.place(run)
            states = run.model(batch, run.model.plan(batch, run.compute.backend))
            slots = SlotInputs.gather(batch, states, run.config.decay)
            unit = held.denominators(run.config.decay)
            out = objective(slots, run.model.frozen_head, run.objective, unit)
            out.loss.backward()  # type: ignore[no-untyped-call]
            run.optimizer.step(
                learning_rate(i, steps, lr, run.config.warmup_ratio, 0.0, run.config.lr_schedule)
            )
        self.sync()
        return time.perf_counter() - started

    def begin(self, masters: dict[str, Tensor]) -> None:
        self.run.optimizer.load(Snapshot(masters, self.moments, 0))

    def verdict(self) -> dict[str, dict[str, float]]:
        """tau and walks by source."""
        out = {}
        for name, rows in self.judged.items():
            self.held_out = rows
            found = self.judge()
            out[name] = {k: found[k] for k in JUDGED}
        return out


@dataclasses.dataclass
class Results:
    """What was found, on disk after every draft."""

    args: argparse.Namespace
    rows: list[dict[str, Any]]
    started: float
    longest: float = 0.0

    @classmethod
    def open(cls, args: argparse.Namespace, started: float) -> Results:
        path = args.out / f"{args.name}.json"
        return cls(args, json.loads(path.read_text())["results"] if path.exists() else [], started)

    def has(self, name: str, seed: int) -> bool:
        return any((row["name"], row["seed"]) == (name, seed) for row in self.rows)

    @property
    def time_left(self) -> bool:
        return time.perf_counter() - self.started + self.longest < self.args.budget

    def keep(self, began: float, **row: Any) -> None:
        own = row["by_source"].get(self.args.own, {})
        others = [v["walk"] for k, v in row["by_source"].items() if k != self.args.own]
        row |= {
            "walk_own": own.get("walk"),
            "walk_others": float(np.mean(others)) if others else None,
        }
        self.rows.append(row)
        self.longest = max(self.longest, time.perf_counter() - began)
        settings = {
            k: str(v) for k, v in vars(self.args).items() if k not in ("model", "data", "out")
        }
        write(self.args.name, settings, self.rows, self.args.out, show=False)
        print(
            f"[{time.perf_counter() - self.started:6.1f} s] {row['name']} seed {row['seed']}: "
            f"own walk {row['walk_own']:.3f}, "
            f"others {row['walk_others']:.3f}, {row['steps']} steps",
            file=sys.stderr,
            flush=True,
        )


def one_seed(study: Study, results: Results, seed: int) -> dict[str, Tensor] | None:
    """All drafts of a seed that are missing and fit; the base's weights."""
    args, run = study.args, study.run
    began = time.perf_counter()
    study.reset(seed)
    seconds = study.fit(
        study.passes_over(study.general, args.steps, seed), args.steps, run.config.lr
    )
    base = {n: t.clone() for n, t in run.optimizer.snapshot().masters.items()}
    if not results.has("none", seed):
        results.keep(
            began,
            name="none",
            seed=seed,
            steps=args.steps,
            lr=run.config.lr,
            seconds=seconds,
            by_source=study.verdict(),
        )
    for n in args.sizes:
        for name, share in ((f"tuned-{n}", 0.0), (f"mixed-{n}", args.general)):
            if results.has(name, seed) or not results.time_left:
                continue
            began, rows = time.perf_counter(), study.order(n, args.passes, seed, share)
            study.begin(base)
            seconds = study.fit(rows, len(rows), args.lr)
            results.keep(
                began,
                name=name,
                seed=seed,
                steps=len(rows),
                lr=args.lr,
                seconds=seconds,
                conversations=study.conversations[n],
                by_source=study.verdict(),
            )
        if not results.has(f"scratch-{n}", seed) and results.time_left:
            began = time.perf_counter()
            study.reset(seed)
            seconds = study.fit(
                study.passes_over(study.own[n], args.scratch, seed), args.scratch, run.config.lr
            )
            results.keep(
                began,
                name=f"scratch-{n}",
                seed=seed,
                steps=args.scratch,
                lr=run.config.lr,
                seconds=seconds,
                conversations=study.conversations[n],
                by_source=study.verdict(),
            )
    return base


def sweep(study: Study, results: Results, base: dict[str, Tensor], seed: int) -> None:
    n = 1000 if 1000 in study.own else study.args.sizes[-1]
    for passes, lr in SWEEP:
        name = f"sweep-{passes}-{lr:g}"
        if results.has(name, seed) or not results.time_left:
            continue
        began, rows = time.perf_counter(), study.order(n, passes, seed, 0.0)
        study.begin(base)
        seconds = study.fit(rows, len(rows), lr)
        results.keep(
            began,
            name=name,
            seed=seed,
            steps=len(rows),
            lr=lr,
            passes=passes,
            seconds=seconds,
            by_source=study.verdict(),
        )


def table(rows: list[dict[str, Any]], own: str) -> str:
    """Means over seeds, and the paired change of the walk against no tuning."""
    none = {row["seed"]: row for row in rows if row["name"] == "none"}
    lines = [
        f"{'draft':18} {'seeds':>5} {'steps':>6} {'walk ' + own:>16} {'others':>8}  change of "
        "both, paired"
    ]
    for name in dict.fromkeys(row["name"] for row in rows):
        found = [row for row in rows if row["name"] == name]
        pairs = [(r, none[r["seed"]]) for r in found if r["seed"] in none]
        change = [
            100 * (np.mean([r[k] / b[k] for r, b in pairs]) - 1)
            for k in ("walk_own", "walk_others")
        ]
        mean = {k: np.mean([r[k] for r in found]) for k in ("steps", "walk_own", "walk_others")}
        lines.append(
            f"{name:18} {len(found):5} {mean['steps']:6.0f} {mean['walk_own']:16.3f} "
            f"{mean['walk_others']:8.3f}  "
            f"{change[0]:+.1f} % {change[1]:+.1f} %"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--own", default="bfcl-v4", help="the source that is held back")
    parser.add_argument(
        "--sizes", default="200,1000,3000", type=lambda text: [int(n) for n in text.split(",")]
    )
    parser.add_argument(
        "--seeds", default="0,1,2", type=lambda text: [int(n) for n in text.split(",")]
    )
    parser.add_argument("--steps", type=int, default=600, help="of the base")
    parser.add_argument("--scratch", type=int, default=250, help="steps from scratch")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument(
        "--general", type=float, default=0.3, help="share of general rows in mixed-N"
    )
    parser.add_argument(
        "--val-rows", type=int, default=2, help="held-out rows of a source, at most"
    )
    parser.add_argument("--limit", type=int, help="rows of the corpus that are dumped  [all]")
    parser.add_argument(
        "--budget",
        type=float,
        default=230,
        help="seconds in all; no draft is begun that would not end within",
    )
    parser.add_argument("--train", default=FLAGS, help=f"flags of dspark-train [{FLAGS}]")
    parser.add_argument("--name", default="finetune")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    store = dumped(args)
    say("dumped")
    run = prepare(config(store, args.train))
    study = Study(run, args)
    rows = {n: len(r) for n, r in study.own.items()}
    say(
        f"{len(study.general)} general rows, own {rows}, judged "
        f"{ ({k: len(v) for k, v in study.judged.items()}) }"
    )
    study.reset(0)
    study.fit(study.general[:3], 3, 1e-4)
    study.verdict()
    say("compiled")
    results, first = Results.open(args, started), None
    for seed in args.seeds:
        if results.time_left:
            base = one_seed(study, results, seed)
            first = first or base
    if first is not None:
        sweep(study, results, first, args.seeds[0])
    print(table(results.rows, args.own))


if __name__ == "__main__":
    main()
