"""Drafts of several types from one store, each trained for the same time, decoded on the same
held-out prompts: one table.

    python bench/drafters.py --model DIR --data FILE.jsonl --out FOLDER [--rows 4000]
        [--seconds 40] [--prompts 16] [--types dspark,dflash,eagle3,peagle]

1. One dump of the first ``--rows`` rows, with the layers that all types need (``dspark-dump
   --for``). ``--store``: one that is there.
2. A process per type compiles. Then each has the GPU to itself for a few steps, one after the
   other, which say how many steps fit into ``--seconds``. Only then do all train, at once, each its
   own number of steps: what they learn is decided by the steps, so they may share the GPU. Weights
   are those of before the trial.
3. Each draft is judged: the walk on held-out rows of the store, and our decoder on the
   ``--prompts`` rows that follow the dumped ones, greedily in float32, compared with the target
   alone on the first ``--alone``.

OUT/drafters.json is written after every draft; a type that fails is a row with ``error``. Settings
are the recipe of the target with the type's own defaults over it, as ``dspark-train
--speculator-type`` takes them; ``--train`` adds flags, ``--train-TYPE`` flags of one type.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing as mp
import statistics
import time
import traceback
from pathlib import Path
from threading import BrokenBarrierError
from typing import Any

from common import write

TYPES = ("dspark", "dflash", "eagle3", "peagle")
WARM, TIMED = 4, 12  # steps
PATIENCE = 400.0  # seconds that a process waits for the others


def dump_store(args: argparse.Namespace, store: Path) -> dict[str, Any]:
    from dspark.dump.config import DumpConfig
    from dspark.dump.progress import Display
    from dspark.dump.run import dump

    began = time.perf_counter()
    config = DumpConfig(
        model=args.model,
        data=args.data,
        output=store,
        limit=args.rows,
        for_=tuple(args.types.split(",")),
        codec=args.codec,
        device=args.device,
        engine="transformers",
        overwrite=True,
    )
    out = dump(config, Display())
    return {
        "seconds": time.perf_counter() - began,
        **{k: out[k] for k in ("samples", "tokens") if k in out},
    }


def held_out(args: argparse.Namespace) -> Path:
    """The rows after the dumped ones as a file of prompts."""
    path = args.out / "prompts.jsonl"
    with open(args.data) as file:
        path.write_text("".join(itertools.islice(file, args.rows, args.rows + args.prompts)))
    if not path.read_text().strip():
        raise SystemExit(
            f"--data has no rows after the first {args.rows}: there is nothing to decode"
        )
    return path


class Training:
    """One draft in its process: begun, timed, trained, judged."""

    def __init__(self, kind: str, args: argparse.Namespace, store: Path, prompts: Path) -> None:
        from feed import config

        from dspark.train.run.setup import prepare

        flags = (
            f"--speculator-type {kind} --no-tensorboard --seed {args.seed} --device "
            f"{args.device} {args.train} {args.own[kind]}"
        )
        self.began = time.perf_counter()
        self.args, self.folder, self.prompts = args, args.out / kind, prompts
        self.run = prepare(config(store, flags))
        self.start = self.run.optimizer.snapshot()
        self.row: dict[str, Any] = {"type": kind, "seed": args.seed, "flags": flags}
        self.row["recipe"] = self.run.config.recipe  # by the target's name: a folder's, too
        self.steps(WARM, 1000)
        self.row["start_seconds"] = time.perf_counter() - self.began

    def steps(self, count: int, total: int, *, waits: bool = False) -> list[float]:
        """``count`` steps of a schedule of ``total``, from the first row on, which is there before
        the clock starts. Seconds of each: ``waits`` for the device after every step, else only
        after the last, and their sum is what counts.
        """
        import torch
        from feed import rows_of

        from dspark.train.data.feed import Feed
        from dspark.train.loop import placer
        from dspark.train.step import share, step

        run, cuda = self.run, self.run.compute.device.type == "cuda"
        rows = rows_of(run)
        feed = Feed(rows, placer(run), run.compute.device)
        feed.fetch()
        if cuda:
            torch.cuda.synchronize()
        tokens, times, began = 0, list[float](), time.perf_counter()
        for number in range(count):
            part = share(run, feed.take, lambda: False)
            told, _ = step(run, feed, part, number, total, None)
            tokens += part.tokens
            if number + 1 < count:
                feed.fetch()
            if waits or number + 1 == count:
                loss = float(told[1])  # waits for the device
            times.append(time.perf_counter() - began - sum(times))
        rows.close()
        self.row |= {"tokens_per_step": tokens / count, "last_loss": loss}
        return times

    def time(self) -> None:
        """Alone on the GPU: how many steps fit into the time, by the median of a few. What happens
        once (memory that is asked for, kernels that are made) is no part of a step.
        """
        ms = [1e3 * seconds for seconds in self.steps(TIMED, 1000, waits=True)]
        median = statistics.median(ms)
        self.row |= {"step_ms": median, "step_ms_mean": sum(ms) / TIMED}
        self.row["steps"] = max(1, round(1e3 * self.args.seconds / median))

    def train(self) -> None:
        from dspark.train.draft.saved.folder import save_draft
        from dspark.train.run.folder import TRAINING

        run, steps = self.run, self.row["steps"]
        run.optimizer.load(self.start)
        self.row["train_seconds"] = sum(self.steps(steps, steps))
        self.row["trained_parameters"] = sum(p.numel() for _, p in run.model.trained())
        self.row["layers"] = list(run.model.config.target_layer_ids)
        save_draft(self.folder, run.model, trained=run.optimizer.snapshot().masters)
        (self.folder / TRAINING).write_text(json.dumps(run.config.to_json(), indent=1) + "\n")

    def walk(self) -> None:
        from dspark.train.data.stream import VALIDATION_EPOCH
        from dspark.train.evaluate import walked

        run = self.run
        if run.validation is None:
            return
        rows = (row for step in run.validation.steps_from(VALIDATION_EPOCH) for row in step)
        found = walked(
            run.model,
            run.cache,
            itertools.islice(rows, self.args.walk_rows),
            device=run.compute.device,
            dtype=run.compute.dtype,
            backend=run.compute.backend,
            anchors_at_once=run.config.max_anchors or 512,
            pad=run.stream.pad,
        )
        self.row |= found.result()

    def decode(self) -> None:
        from dspark.tools.judge.evaluating import EvalConfig, evaluate

        began = time.perf_counter()
        found = evaluate(
            EvalConfig(
                model=self.args.model,
                draft=str(self.folder),
                data=str(self.prompts),
                max_tokens=self.args.max_tokens,
                alone=self.args.alone,
                dtype="float32",
                device=self.args.device,
            )
        )
        kept = (
            "mean_accepted_length",
            "mean_accepted_length_se",
            "accept_rate",
            "drafts",
            "tokens",
            "lossless",
            "relative_cost",
            "theoretical_gain",
        )
        self.row |= {k: found[k] for k in kept} | {"eval_seconds": time.perf_counter() - began}


def work(
    kind: str,
    args: argparse.Namespace,
    store: Path,
    prompts: Path,
    barrier: Any,
    gpu: Any,
    out: Any,
) -> None:
    """A type's process. One that fails goes through the barriers with the others and says why at
    the end.
    """
    row: dict[str, Any] = {"type": kind}
    training: Training | None = None

    def attempt(name: str) -> None:
        nonlocal training, row
        if "error" in row:
            return
        try:
            if training is None:
                training = Training(kind, args, store, prompts)
                row = training.row
            else:
                getattr(training, name)()
        except Exception:
            row["error"] = traceback.format_exc()[-1500:]

    try:
        attempt("begin")
        barrier.wait(PATIENCE)
        with gpu:
            attempt("time")
        barrier.wait(PATIENCE)
        for name in ("train", "walk", "decode"):
            attempt(name)
    except BrokenBarrierError:
        row["error"] = "another process ended without a word"
    finally:
        out.put(row)


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| type | layers read | trained, M | step ms | steps | accepted length | walk, greedy | "
        "walk, T = 1 | lossless |",
        "|---|---|---|---|---|---|---|---|---|",
    ]

    def number(row: dict[str, Any], name: str, digits: int = 3) -> str:
        return "-" if row.get(name) is None else f"{row[name]:.{digits}f}"

    for row in rows:
        if "error" in row and "mean_accepted_length" not in row:
            lines.append(f"| {row['type']} | failed: {row['error'].strip().splitlines()[-1]} |")
            continue
        lines.append(
            f"| {row['type']} | {row['layers']} | {row['trained_parameters'] / 1e6:.1f} | "
            f"{number(row, 'step_ms', 1)} | {row['steps']} | "
            f"{number(row, 'mean_accepted_length')} ± {number(row, 'mean_accepted_length_se')} | "
            f"{number(row, 'walk_greedy')} | "
            f"{number(row, 'walk')} | {row['lossless']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--store", type=Path, help="a store that is there already")
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--codec", default="rotated-4-4")
    parser.add_argument("--seconds", type=float, default=40, help="of training, each")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--alone", type=int, default=4)
    parser.add_argument("--walk-rows", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument(
        "--train", default="--val-rows 4 --workers 3", help="more flags of dspark-train"
    )
    for kind in TYPES:
        parser.add_argument(f"--train-{kind}", default="", help=f"more flags for {kind}")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    kinds = args.types.split(",")
    args.own = {kind: getattr(args, f"train_{kind}") for kind in TYPES}
    config = {
        k: v for k, v in vars(args).items() if k not in ("model", "data", "out", "store", "own")
    }
    prompts, began = held_out(args), time.perf_counter()
    store = args.store or args.out / "hs.zarr"
    made = None if args.store else dump_store(args, store)
    context = mp.get_context("spawn")
    barrier, gpu, out = context.Barrier(len(kinds)), context.Lock(), context.Queue()
    workers = [
        context.Process(target=work, args=(kind, args, store, prompts, barrier, gpu, out))
        for kind in kinds
    ]
    for worker in workers:
        worker.start()
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < len(kinds):
        row = out.get(timeout=2 * PATIENCE)
        rows[row["type"]] = row
        print(f"[{time.perf_counter() - began:6.1f} s] {json.dumps(row)}", flush=True)
        done = [rows[kind] for kind in kinds if kind in rows]
        result = {"dump": made, "drafts": done, "seconds": time.perf_counter() - began}
        write("drafters", config, result, args.out, show=False)
    for worker in workers:
        worker.join()
    print(table([rows[kind] for kind in kinds]))


if __name__ == "__main__":
    main()
