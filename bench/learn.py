"""What makes a better draft in the same minutes: paired trainings at equal time, as many as fit.

    python bench/learn.py --store 4-4.zarr --out DIR [--seconds 12] [--budget 300] [--seeds 0,1,2]
        [--variants thin,heads-3] [--also 'NAME=lr=3e-3 block=failure'] [--model TARGET]
        [--ladder 80,160,320] [--base 'anchors=2048'] [--against kl-0.3] [--keep] [--train "..."]
    python bench/learn.py --out DIR --show

Each variant takes the steps that fit into ``--seconds`` at its own step time (least of five short
probes, in turns with the recipe's, before the first training: no other process trains then). Order
of rows, anchors and initial weights of a seed are the same for all. Judged at every anchor of the
held-out rows: tau, and the walk (``train/objective/walk.py``), which is what decoding reaches.

First each variant once. What gains ``--pays`` of walk over ``--against`` and loses no tau to
``wsd`` is joined to ``kept``, which takes part with every seed like ``wsd`` and ``cosine`` (the
published losses with these schedules) and ``--against``; ``--ladder`` is the recipe for so many
steps; last, the other seeds of the best variants. Several processes with one ``--out`` share the
work; they may share a GPU, since times are steps times that of a step alone. A later call goes on.
A variant that would not end within ``--budget`` seconds is not begun.

Settings of a variant: bench/learn_variants.py. Writes NAME.json to ``--results`` after every one,
``--keep`` the drafts to DIR/drafts, and prints the table: means over the seeds, and mean and
standard error of the paired changes of the walk.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from feed import config
from learn_board import Board
from learn_lab import Lab
from learn_variants import ALWAYS, CANDIDATES, MORE, Variant, joined

from common import RESULTS, write
from dspark.train.draft.saved.folder import save_draft
from dspark.train.run.folder import TRAINING
from dspark.train.run.setup import prepare

FLAGS = "--recipe SmolLM2-135M --no-tensorboard --val-rows 6"
LOSES = 0.005  # of tau that a change may cost
BEST = 4  # variants that get the other seeds
KEPT = "kept"

Row = dict[str, Any]
Say = Callable[[str], None]


class Plan:
    """Which trainings there are, in the order of their importance."""

    def __init__(self, args: argparse.Namespace, board: Board) -> None:
        also = dict(given.split("=", 1) for given in args.also)
        known = {**CANDIDATES, **MORE, **also}
        usual = [*CANDIDATES, *also]
        names = args.variants.split(",") if args.variants is not None else usual
        names = [name for name in names if name]
        if unknown := [name for name in names if name not in known]:
            raise SystemExit(
                f"no such variants: {', '.join(unknown)}; there are {', '.join(known)}"
            )
        self.settings = {name: known[name] for name in names} | ALWAYS
        self.base, self.against = args.base, args.against
        self.names, self.board, self.pays = names, board, args.pays
        self.seeds = [int(seed) for seed in args.seeds.split(",")]
        for steps in filter(None, args.ladder.split(",")):
            self.settings[f"steps-{steps}"] = f"steps={steps}"
        self.ladder = [name for name in self.settings if name.startswith("steps-")]
        if self.against not in self.settings:
            raise SystemExit(f"--against {self.against} is no variant of this call")

    def found(self, name: str, seed: int) -> Row | None:
        row: Row | None = self.board.get(f"{name}-{seed}")
        return row

    @property
    def screened(self) -> bool:
        """Whether every variant has its first result."""
        return all(self.found(name, self.seeds[0]) for name in (*self.names, *ALWAYS))

    def gains(self) -> dict[str, float]:
        """Change of the walk with the first seed, best first, of those that lose no tau."""
        first = self.seeds[0]
        base, usual = self.found(self.against, first), self.found("wsd", first)
        out = {}
        for name in self.names:
            row = self.found(name, first)
            if not base or not usual or not row or "error" in row or name == self.against:
                continue
            if row["tau"] >= (1 - LOSES) * usual["tau"]:
                out[name] = row["walk"] / base["walk"] - 1
        return dict(sorted(out.items(), key=lambda pair: -pair[1]))

    def kept(self) -> str:
        """What pays, as one variant."""
        good = [self.settings[n] for n, gain in self.gains().items() if gain >= self.pays]
        own = [] if self.against in ALWAYS else [self.settings[self.against]]
        return joined([*good, *own]) if good else ""

    def jobs(self) -> Iterator[tuple[str, str, int]]:
        """Name, settings and seed of all that is known to be worth it by now."""
        for name, text, seed in self._worth():
            yield name, f"{self.base} {text}".strip(), seed

    def _worth(self) -> Iterator[tuple[str, str, int]]:
        first, *others = self.seeds

        def of(names: list[str], seeds: list[int]) -> Iterator[tuple[str, str, int]]:
            return ((name, self.settings[name], seed) for seed in seeds for name in names)

        always = list(dict.fromkeys(["wsd", self.against, "cosine"]))
        yield from of(list(dict.fromkeys(["wsd", *self.names, *always])), [first])
        kept = self.kept() if self.screened else ""
        if kept:
            yield KEPT, kept, first
        yield from of(self.ladder, [first])
        for seed in others:
            if kept:
                yield KEPT, kept, seed
            yield from of(always, [seed])
        if self.screened:
            yield from of(list(self.gains())[:BEST], others)

    def rows(self) -> list[Row]:
        """All results so far."""
        names = [*self.settings, KEPT]
        found = (self.found(name, seed) for name in names for seed in self.seeds)
        return [row for row in found if row]


class Trainings:
    """What one process does of a plan."""

    def __init__(self, args: argparse.Namespace, plan: Plan, say: Say) -> None:
        self.started, self.args, self.plan, self.say = time.perf_counter(), args, plan, say
        plan.board.arrive("begun")
        self.run = prepare(config(args.store, args.train))
        self.say(f"prepared after {self.spent():.0f} s")
        self.lab = Lab(self.run, args.rows, args.model)
        self.say(f"held-out rows read after {self.spent():.0f} s")
        self.usual = Variant.parse("wsd", f"{args.base} {ALWAYS['wsd']}", self.run)
        self.lab.reset(0, self.usual)
        self.lab.train(self.usual, 0, 3, 100)  # compiles
        self.lab.judge()
        self.say(f"compiled after {self.spent():.0f} s")
        self.lab.wait()
        self.say(f"{len(self.lab.rows)} rows read after {self.spent():.0f} s")
        # the others wait here, so that nothing of theirs slows the steps
        plan.board.arrive("ready")
        self.times: dict[str, float] = plan.board.once("times", self._measure)
        self.step = self.times[named(self.usual)]
        self.say(f"measured after {self.spent():.0f} s")

    def _measure(self) -> dict[str, float]:
        """Seconds of a step of each kind that the plan has by now."""
        if not self.plan.board.await_all("ready", of="begun", wait=60):
            self.say("another process is not ready: steps are timed beside it")
        kinds = {named(self.usual): self.usual}
        for name, text, _ in self.plan.jobs():
            v = Variant.parse(name, text, self.run)
            kinds.setdefault(named(v), v)
        probe = self.args.probe
        found = dict(zip(kinds, self.lab.step_times(list(kinds.values()), probe), strict=True))
        self.lab.tables = False
        (alone,) = self.lab.step_times([self.usual], probe)
        self.lab.tables = True
        told = {**found, "recipe's without the readers' tables": alone}
        self.say(f"ms of a step: { {k: round(1e3 * t, 2) for k, t in told.items()} }")
        self.plan.board.put("without-tables", alone)
        return found

    def spent(self) -> float:
        return time.perf_counter() - self.started

    def time_of(self, v: Variant) -> float:
        """Seconds of a step, measured beside the recipe's where they can differ."""
        if named(v) in self.times:
            return self.times[named(v)]

        def ratio() -> float:
            own, beside = self.lab.step_times([v, self.usual], self.args.probe)
            self.say(f"{v.name}: a step takes {1e3 * own:.1f} ms, the recipe's {1e3 * beside:.1f}")
            return own / beside

        return self.step * float(self.plan.board.once(f"time-{named(v)}", ratio))

    def one(self, name: str, text: str, seed: int) -> Row:
        """Train, judge and perhaps keep one draft."""
        v = Variant.parse(name, text, self.run)
        took = self.time_of(v)
        steps = v.steps or max(1, round(self.args.seconds / took))
        self.lab.reset(seed, v)
        seconds = self.lab.train(v, seed, steps, steps)
        row = {"name": name, "settings": text, "seed": seed, "steps": steps}
        row |= {"step_ms": 1e3 * took, "seconds": steps * took, "wall_seconds": seconds}
        row |= self.lab.judge()
        if self.args.keep:
            folder = self.args.out / "drafts" / f"{name}-{seed}"
            masters = self.run.optimizer.snapshot().masters
            save_draft(folder, self.run.model, trained=masters)
            (folder / TRAINING).write_text(json.dumps(self.run.config.to_json(), indent=1) + "\n")
        return row

    def work(self) -> None:
        """Do what is not done, until all is or the time is up."""
        longest = self.args.seconds
        while True:
            jobs = [j for j in self.plan.jobs() if not self.plan.found(j[0], j[2])]
            if not jobs and self.plan.screened:
                return
            if self.spent() + longest > self.args.budget:
                self.say(f"{self.args.budget} s are used up; {len(jobs)} trainings are left")
                return
            job = next((j for j in jobs if self.plan.board.claim(f"{j[0]}-{j[2]}")), None)
            if job is None:
                if self.plan.screened:
                    return  # others do the rest
                time.sleep(0.2)
                continue
            begun, (name, _, seed) = time.perf_counter(), job
            try:
                row = self.one(*job)
            except torch.OutOfMemoryError:
                self.plan.board.release(f"{name}-{seed}")
                raise  # another process, with this one's memory, can do it
            except (RuntimeError, AssertionError) as error:
                traceback.print_exc()
                row = {"name": name, "seed": seed, "error": f"{type(error).__name__}: {error}"}
            self.plan.board.put(f"{name}-{seed}", row)
            longest = max(longest, time.perf_counter() - begun)
            told = row.get("error") or f"tau {row['tau']:.3f} walk {row['walk']:.3f}"
            self.say(f"{name} seed {seed}: {told} ({self.spent():.0f} s)")
            record(self.args, self.plan)


def named(v: Variant) -> str:
    """The kind of its steps."""
    return "-".join(str(part) for part in v.shape)


def record(args: argparse.Namespace, plan: Plan) -> None:
    """Write what there is."""
    hidden = ("store", "results", "out", "model", "keep", "show")
    said = {k: str(x) for k, x in vars(args).items() if k not in hidden}
    said |= {"kept": plan.kept() if plan.screened else None}
    write(args.name, said, plan.rows(), args.results, show=False)


def paired(rows: list[Row], name: str, against: str, key: str = "walk") -> tuple[float, float, int]:
    """Mean and standard error of the changes, over the seeds that both have, and how many."""
    of = {(r["name"], r["seed"]): r[key] for r in rows}
    seeds = [s for n, s in of if n == name and (against, s) in of]
    changes = [of[name, s] / of[against, s] - 1 for s in seeds]
    if not changes:
        return math.nan, math.nan, 0
    error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else math.nan
    return statistics.mean(changes), error, len(changes)


def shown(change: tuple[float, float, int]) -> str:
    """``+7.6 ± 0.2 %``; without an error where there is one seed."""
    mean, error, count = change
    if count < 2:
        return "" if count == 0 else f"{100 * mean:+.1f} %"
    return f"{100 * mean:+.1f} ± {100 * error:.1f} %"


def table(rows: list[Row]) -> str:
    """A Markdown table, best walk first; what failed is below it."""
    good = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(row["name"] for row in good))
    columns = ("tau", "walk", "walk_sampled", "steps", "step_ms", "seconds")
    mean = {
        (n, k): statistics.mean(r[k] for r in good if r["name"] == n)
        for n in names
        for k in columns
    }
    lines = [
        "| variant | seeds | tau | walk, greedy | walk at T = 1 | steps | step ms | seconds | "
        "against cosine | against wsd | tau against wsd |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for n in sorted(names, key=lambda n: -mean[n, "walk"]):
        against = [paired(good, n, base) for base in ALWAYS if base != n]
        cells = [shown(change) for change in against]
        if n in ALWAYS:
            cells.insert(list(ALWAYS).index(n), "")
        cells.append("" if n == "wsd" else shown(paired(good, n, "wsd", "tau")))
        lines.append(
            f"| {n} | {sum(r['name'] == n for r in good)} | {mean[n, 'tau']:.3f} "
            f"| {mean[n, 'walk']:.3f} | {mean[n, 'walk_sampled']:.3f} | {mean[n, 'steps']:.0f} "
            f"| {mean[n, 'step_ms']:.1f} | {mean[n, 'seconds']:.1f} | {' | '.join(cells)} |"
        )
    failed = [f"{r['name']} seed {r['seed']} failed: {r['error']}" for r in rows if "error" in r]
    for row in good:
        if row["name"] in (*ALWAYS, KEPT) and row["seed"] == good[0]["seed"]:
            slots = " ".join(f"{x:.3f}" for x in row["walk_accept"])
            failed.append(
                f"{row['name']}: where the walk gets to a slot it gets beyond it: {slots}"
            )
    return "\n".join([*lines, "", *failed])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder that processes share")
    parser.add_argument("--model", type=Path, help="the target's folder, for init=layers")
    parser.add_argument("--seconds", type=float, default=12.0, help="of every training")
    parser.add_argument("--budget", type=float, default=300, help="seconds of this process")
    parser.add_argument("--rows", type=int, default=660, help="packed rows held on the device")
    parser.add_argument("--probe", type=int, default=30, help="steps of a probe  [%(default)s]")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--variants", help="comma separated  [all]")
    parser.add_argument("--also", action="append", default=[], metavar="NAME=SETTINGS")
    parser.add_argument("--base", default="", help="settings of every variant, if not its own")
    parser.add_argument("--against", default="wsd", help="what a change must beat  [%(default)s]")
    parser.add_argument("--ladder", default="", help="steps of weaker drafts, comma separated")
    parser.add_argument("--pays", type=float, default=0.008, help="gain of the walk that is kept")
    parser.add_argument("--keep", action="store_true", help="keep the drafts")
    parser.add_argument("--show", action="store_true", help="print the table and stop")
    parser.add_argument("--train", default=FLAGS, help=f"flags of dspark-train [{FLAGS}]")
    parser.add_argument("--name", default="learn_equal_time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    plan = Plan(args, Board(args.out / "board"))
    if not args.show:
        if args.store is None:
            parser.error("--store is needed")
        say = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        Trainings(args, plan, say).work()
        record(args, plan)
    rows = plan.rows()
    text = table(rows)
    (args.out / "table.md").write_text(text + "\n")
    print(text)
    if plan.screened:
        print(f"kept: {plan.kept() or 'nothing'}")
    sys.exit(1 if any("error" in row for row in rows) else 0)


if __name__ == "__main__":
    main()
