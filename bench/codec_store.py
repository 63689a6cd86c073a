"""Stores of several codecs, made by the product: bytes, speed of dump and training, and tau of
drafts trained on them.

    python bench/codec_store.py --model DIR --data FILE.jsonl --out FOLDER [--rows 9000]
        [--steps 600] [--seconds 480] [--device cuda]

Stages, each with the real commands, and FOLDER/codec_store.json is written after each:

1. ``dump``: lossless, rotated-4-4 and default through bench/dump.py (``dspark.dump.run.dump`` on
   one engine), beside bare prefill.
2. ``info`` of each store.
3. ``train`` from lossless and default, side by side if ``--together`` is 2, then ``score`` of both
   drafts on the lossless store.
4. ``speed``: trainings of ``--speed-steps`` from rotated-4-4 and default, one at a time: tokens per
   second and share of waiting for data.
5. ``recode`` of the lossless store to small, its ``info``, training and score.

A stage that does not fit into what is left of ``--seconds`` is cut or left out, and the file says
so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import RESULTS, hardware, versions
from dspark.train.run.metrics_file import read_metrics

BENCH = Path(__file__).parent
SCORED = ("mean_accepted_length", "accept_rate", "loss")


class Budget:
    """What is left of the seconds, and what was found, kept in ``path``."""

    def __init__(self, seconds: float, path: Path, config: dict[str, Any]) -> None:
        self.began, self.seconds, self.path = time.monotonic(), seconds, path
        self.found: dict[str, Any] = {
            "config": config,
            "hardware": hardware(),
            "versions": versions(),
        }

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def keep(self, stage: str, name: str, value: Any) -> None:
        self.found.setdefault(stage, {})[name] = value
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        print(
            f"[{self.seconds - self.left:6.1f} s] {stage} {name}: {json.dumps(value)}", flush=True
        )

    def run(self, stage: str, name: str, *call: object) -> tuple[str, float] | None:
        """Output and seconds of a command; None, and why in the file, where it failed or had no
        time.
        """
        if self.left < 5:
            self.keep(stage, name, {"left_out": "no time"})
            return None
        began = time.monotonic()
        log = self.path.with_name(f"{stage}-{name}.log")
        try:
            with log.open("w") as err:
                done = subprocess.run(
                    [sys.executable, *map(str, call)],
                    stdout=subprocess.PIPE, stderr=err, text=True, timeout=self.left, check=True,
                    env=os.environ | {"PYTHONUNBUFFERED": "1"},
                )  # fmt: skip
        except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
            self.keep(stage, name, {"left_out": str(error)[-300:], "log": log.read_text()[-2000:]})
            return None
        return done.stdout, time.monotonic() - began


def reported(out: str) -> dict[str, Any]:
    """The JSON object that a command ended with."""
    found: dict[str, Any] = json.loads(out[out.index("{") :])
    return found


class Stages:
    def __init__(self, args: argparse.Namespace, budget: Budget) -> None:
        self.args, self.budget = args, budget
        self.stores, self.drafts = args.out / "stores", args.out / "drafts"
        for folder in (self.stores, self.drafts):
            folder.mkdir(parents=True, exist_ok=True)

    def store(self, name: str) -> Path:
        out: Path = self.stores / f"{name}.zarr"
        return out

    def dump(self, names: list[str]) -> None:
        name = "codec_store_dump"
        a = self.args
        (RESULTS / f"{name}.json").unlink(missing_ok=True)
        done = self.budget.run(
            "dump",
            "all",
            BENCH / "dump.py",
            "--target",
            a.model,
            "--data",
            a.data,
            "--codecs",
            ",".join(names),
            "--output",
            self.stores,
            "--keep",
            "--rows",
            a.rows,
            "--parts",
            a.parts,
            "--name",
            name,
        )
        result = RESULTS / f"{name}.json"
        if result.exists():  # also of a dump that was cut
            self.budget.keep("dump", "stages", json.loads(result.read_text()))
            result.unlink()
        if done:
            self.budget.keep("dump", "seconds", done[1])

    def info(self, name: str) -> None:
        if not self.store(name).exists():
            return
        done = self.budget.run(
            "info", name, "-m", "dspark.tools", "info", self.store(name), "--json"
        )
        if done:
            said = reported(done[0])
            if not said["complete"]:
                self.budget.keep("info", name, {"left_out": "the store is not complete"})
                return
            learnt = self.store(name) / "calibration.safetensors"
            size = learnt.stat().st_size if learnt.exists() else 0
            kept = (
                "codec",
                "tokens",
                "last_rows",
                "samples",
                "parts",
                "bytes_per_token",
                "ratio",
                "bytes_on_disk",
                "frozen_bytes",
                "aux_bits_measured",
                "last_bits_measured",
                "quality",
            )
            row = {k: said[k] for k in kept} | {"calibration_bytes": size}
            whole = said["bytes_per_token"] + size / said["tokens"]
            self.budget.keep(
                "info", name, row | {"ratio_with_calibration": said["raw_bytes_per_token"] / whole}
            )

    def recode(self, name: str) -> None:
        done = self.budget.run(
            "recode",
            name,
            "-m",
            "dspark.tools",
            "recode",
            self.store("lossless"),
            self.store(name),
            "--codec",
            name,
            "--device",
            self.args.device,
            "--json",
        )
        if done:
            self.budget.keep("recode", name, {"seconds": done[1]})

    def train(self, name: str, steps: int, stage: str) -> None:
        draft = self.drafts / f"{stage}-{name}"
        done = self.budget.run(
            stage,
            name,
            "-m",
            "dspark.train",
            "--cache",
            self.store(name),
            "--output",
            draft,
            "--max-steps",
            steps,
            "--seed",
            self.args.seed,
            "--device",
            self.args.device,
            "--no-tensorboard",
            "--keep-checkpoints",
            1,
            "--log-every",
            max(1, steps // 30),
            "--overwrite",
            *self.args.train.split(),
        )
        if not done:
            return
        rows = [row for _, row in read_metrics(draft)]
        steady = [r for r in rows if "tokens_per_second" in r][2:] or [
            r for r in rows if "tokens_per_second" in r
        ]
        self.budget.keep(
            stage,
            name,
            {
                "seconds": done[1],
                **{
                    k: statistics.median(r[k] for r in steady)
                    for k in ("tokens_per_second", "data_wait_fraction", "step_ms")
                },
            },
        )

    def score(self, name: str) -> None:
        draft = self.drafts / f"train-{name}"
        if not (draft / "model.safetensors").exists() and not draft.exists():
            return
        done = self.budget.run(
            "score",
            name,
            "-m",
            "dspark.tools",
            "score",
            "--cache",
            self.store("lossless"),
            "--draft",
            draft,
            "--split",
            "validation",
            "--device",
            self.args.device,
            "--json",
        )
        if done:
            said = reported(done[0])
            self.budget.keep(
                "score", name, {k: said[k] for k in SCORED if k in said} | {"seconds": done[1]}
            )

    def learn(self, names: list[str]) -> None:
        """Train and score, ``--together`` at once."""
        with ThreadPoolExecutor(self.args.together) as pool:
            list(pool.map(lambda n: self.train(n, self.args.steps, "train"), names))
            list(pool.map(self.score, names))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--rows", type=int, default=9000)
    parser.add_argument(
        "--parts", type=int, default=4, help="parts that the stages of a dump are measured on"
    )
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--speed-steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--together", type=int, default=2, help="trainings at once")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--default", default="default", help="codec in the default's place")
    parser.add_argument("--small", default="small", help="codec in small's place")
    parser.add_argument("--train", default="", help="more flags of dspark-train")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    config = {k: v for k, v in vars(args).items() if k not in ("model", "data", "out")}
    stages = Stages(args, Budget(args.seconds, args.out / "codec_store.json", config))
    first, dumped = args.default, ["lossless", "rotated-4-4", args.default]
    stages.dump(dumped)
    for name in dumped:
        stages.info(name)
    stages.learn(["lossless", first])
    for name in ("rotated-4-4", first):
        stages.train(name, args.speed_steps, "speed")
    stages.recode(args.small)
    stages.info(args.small)
    stages.learn([args.small])
    stages.budget.keep("end", "left", stages.budget.left)


if __name__ == "__main__":
    main()
