"""Bytes against tau from stores on disk, and the speed of training from each: what the product
writes, reads and decodes.

    python bench/klt_stores.py --model DIR --data train.jsonl.gz --out DIR --stores DIR
        [--seeds 0,1,2,3,4] [--seconds 560]
        [--codecs exact,klt-1-1,klt-0.8-1,klt-0.7-1,rotated-4-4,rotated-2-4] [--steps 1200]
        [--speed-steps 0] [--tiny]

1. ``bench/dump.py`` dumps the same rows once per codec into STORES (``exact`` is the lossless
   store), beside bare prefill.
2. Every store is read through ``dspark.cache`` and decoded on the device. Drafts of one seed have
   the same initial weights, batches and anchors; tau is judged on the exact states of held-out
   prompts, paired by seed (``codec_klt.py``).
3. ``--speed-steps``: the same steps from the device's memory and from each store through the
   product's stream and feed.

Bytes per token are all files of a store but the target's weights; its calibration file counts.
OUT/klt_stores.json is written after every step, and what is there already is not repeated, so a run
that ``--seconds`` cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from codec_klt import DECAY, STARTED, States, Trainer, say, table
from codec_klt_states import Corpus, _drawn

import dspark.cache
from common import RESULTS, write
from dspark.cache.codec.base import join_states, tokens_of
from dspark.cache.reader import Cache
from dspark.dump.target.config import load_target
from dspark.train.data.feed import Feed
from dspark.train.data.row import Row
from dspark.train.data.stream import Stream, split
from dspark.train.objective.objective import Denominators, ObjectiveConfig, SlotInputs, objective

EXACT = "lossless"
THREADS = 12


def store(args: argparse.Namespace, name: str) -> Path:
    return Path(args.stores) / f"{EXACT if name == 'exact' else name}.zarr"


def dumped(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Dump what is missing; what bench/dump.py measured."""
    args.stores.mkdir(parents=True, exist_ok=True)
    data = args.stores / "rows.jsonl"
    if not data.exists():
        with (gzip.open if args.data.suffix == ".gz" else open)(args.data, "rt") as file:
            lines = [
                line for line in enumerate(file) if args.only is None or args.only.search(line[1])
            ]
        data.write_text("".join(line for _, line in _drawn(lines, args.rows)))
    missing = [store(args, n).stem for n in names if not (store(args, n) / "zarr.json").exists()]
    if not missing:
        return {}
    subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("dump.py")),
            "--target",
            args.model,
            "--data",
            str(data),
            "--codecs",
            ",".join(missing),
            "--output",
            str(args.stores),
            "--keep",
            "--name",
            "klt_stores_dump",
            "--parts",
            "2" if args.tiny else "6",
        ],
        check=True,
    )
    path = RESULTS / "klt_stores_dump.json"
    found: dict[str, Any] = {r["codec"]: r for r in json.loads(path.read_text())["results"]}
    path.unlink()
    return found


def corpus_of(cache: Cache, model: str) -> Corpus:
    samples = [cache.tokens(i) for i in range(len(cache))]
    mask = cache.manifest.target.mask_token_id
    return Corpus(
        samples, len(samples), load_target(model).config, tuple(cache.manifest.layers), mask
    )


class Decoded:
    """One store at a time, decoded into one pair of buffers on the device."""

    def __init__(self, args: argparse.Namespace, corpus: Corpus, exact: States | None) -> None:
        self.args, self.corpus, self.held = args, corpus, ""
        self.device = torch.device(args.device)
        self.aux = self.last = torch.empty(0)
        self.exact = exact

    def use(self, name: str) -> States:
        if self.held != name:
            cache = dspark.cache.open(store(self.args, name))
            m = cache.manifest
            if not self.aux.numel():
                shape = int(self.corpus.start[-1]) + 1, len(m.layers), m.target.hidden_size
                self.aux = torch.zeros(shape, dtype=torch.bfloat16, device=self.device)
                ends = int(self.corpus.last_start[-1])
                self.last = torch.zeros(ends, shape[2], dtype=torch.bfloat16, device=self.device)
            began = time.monotonic()
            runs = np.array_split(np.arange(len(cache)), max(1, len(cache) // 32))
            with ThreadPoolExecutor(THREADS) as pool:
                list(pool.map(lambda run: self._fill(cache, run), runs))
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            say(name, f"read and decoded in {time.monotonic() - began:.1f} s")
            self.held = name
        assert self.exact is not None
        return States(self.aux, self.last, self.exact.frozen)

    @torch.no_grad()
    def _fill(self, cache: Cache, members: Any) -> None:
        own = Cache(cache.path, cache.manifest)  # files of its own; a Cache belongs to one thread
        samples = [own.read(int(i)) for i in members]
        for i, sample in zip(members, samples, strict=True):
            assert np.array_equal(sample.tokens.input_ids, self.corpus.samples[i].input_ids)
        tokens = tokens_of([s.tokens for s in samples], cache.embedding_on(self.device))
        codes = {n: torch.from_numpy(x).to(self.device) for n, x in join_states(samples).items()}
        aux, last = cache.codec.decode(
            codes, cache.manifest.target.hidden_size, tokens, self.aux.dtype
        )
        first, end = int(members[0]), int(members[-1]) + 1
        self.aux[self.corpus.start[first] : self.corpus.start[end]] = aux
        self.last[self.corpus.last_start[first] : self.corpus.last_start[end]] = last


def size_of(path: Path, tokens: int) -> dict[str, Any]:
    """Bytes per token of all files but the target's, the calibration file in it and apart."""
    files = [p for p in path.rglob("*") if p.is_file()]
    kept = sum(p.stat().st_size for p in files if "target" not in p.relative_to(path).parts)
    learnt = path / "calibration.safetensors"
    calibration = learnt.stat().st_size if learnt.exists() else 0
    return {"bytes_per_token": (kept - calibration) / tokens, "calibration_bytes": calibration}


def speed(args: argparse.Namespace, trainer: Trainer, path: Path | None) -> dict[str, Any]:
    """Milliseconds per step of the trainer's draft, from the store ``path`` through stream and
    feed; None: from the device's memory.
    """
    device, config = trainer.device, ObjectiveConfig()
    backend = "flex" if trainer.cuda else "sdpa"

    def train(batch: Any, weights: Denominators) -> None:
        trainer.optimizer.last_row()
        slots = SlotInputs.gather(
            batch, trainer.model(batch, trainer.model.plan(batch, backend)), DECAY
        )
        objective(slots, trainer.model.frozen_head, config, weights).loss.backward()  # type: ignore[no-untyped-call]
        trainer.optimizer.step(1e-4)

    def resident() -> Iterator[float]:
        assert trainer.batches is not None
        for i in range(len(trainer.batches.made)):
            batch, tokens, lasts, weights = trainer.batches[i]
            train(
                trainer._placed((batch, tokens, lasts), trainer.exact.aux, trainer.exact.last),
                weights,
            )
            yield 0.0

    def streamed(cache: Cache) -> Iterator[float]:
        stream = Stream(
            cache,
            trainer.corpus.train,
            seed=0,
            total_seq_len=args.seq,
            rows_per_step=1,
            block_size=args.block,
            max_anchors=args.anchors,
            pad=True,
        )
        steps = stream.steps_from(
            0, workers=0 if args.tiny else THREADS, pin=trainer.cuda, endless=True
        )
        feed = Feed(steps, lambda row: row.place(cache, device, trainer.dtype), device)
        while True:
            rows: list[Row] = feed.take()
            weights = Denominators.of(rows[0].batch, DECAY)
            for batch in feed.batches(rows):
                train(batch, weights)
            feed.fetch()
            feed.queued()
            yield feed.waited

    source = resident() if path is None else streamed(dspark.cache.open(path))
    for _ in range(args.warm):
        waited = next(source)
    if trainer.cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(args.speed_steps):
        at = next(source)
    if trainer.cuda:
        torch.cuda.synchronize()
    took = time.perf_counter() - began
    source.close()  # type: ignore[attr-defined]
    return {"ms": 1000 * took / args.speed_steps, "data_wait": (at - waited) / took}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--stores", required=True, type=Path)
    parser.add_argument("--before", type=Path, help="results to go on from  [default: OUT's]")
    parser.add_argument("--rows", type=int, default=9000)
    parser.add_argument("--only", type=re.compile, default=None)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument(
        "--codecs", default="exact,klt-1-1,klt-0.8-1,klt-0.7-1,rotated-4-4,rotated-2-4"
    )
    parser.add_argument("--speed-steps", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=560.0)
    parser.add_argument("--tiny", action="store_true", help="a dry run on a CPU")
    args = parser.parse_args()
    wide = {
        "seq": 16384,
        "anchors": 2048,
        "block": 7,
        "draft_layers": 3,
        "rank": 256,
        "lr": 2e-3,
        "val": 0.08,
        "warm": 12,
    }
    small = {
        "seq": 1024,
        "anchors": 48,
        "block": 4,
        "draft_layers": 1,
        "rank": 16,
        "rows": 400,
        "steps": 3,
        "val": 0.2,
        "warm": 1,
    }
    vars(args).update(wide | (small if args.tiny else {}))
    args.device = "cuda" if torch.cuda.is_available() and not args.tiny else "cpu"
    return args


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    before = args.before or args.out / "klt_stores.json"
    found: dict[str, Any] = json.loads(before.read_text())["results"] if before.exists() else {}
    names = args.codecs.split(",")
    found["dump"] = found.get("dump", {}) | dumped(
        args, ["exact", *(n for n in names if n != "exact")]
    )
    say("dumped")
    cache = dspark.cache.open(store(args, "exact"))
    corpus = corpus_of(cache, args.model)
    corpus.train, corpus.held_out = split(corpus.keys, args.val)
    first = Decoded(args, corpus, None)
    first.exact = States(first.aux, first.last, cache.target)
    held = first.use("exact")
    frozen = cache.target
    exact = States(held.aux, held.last, frozen)
    decoded, trainer = Decoded(args, corpus, exact), Trainer(args, corpus, exact, frozen)
    raw = 6 + 2 * exact.last.shape[1] * (len(corpus.layers) + 1)
    sizes = {n: size_of(store(args, n), corpus.tokens) for n in names}
    sizes["exact"] = {"bytes_per_token": 0.0, "calibration_bytes": 0}
    config = {
        k: getattr(v, "pattern", v if isinstance(v, int | float) else str(v))
        for k, v in vars(args).items()
    }
    for private in ("model", "data", "out", "stores", "before"):
        del config[private]
    runs = found.setdefault("runs", [])
    longest = 0.0

    def keep() -> None:
        found["table"] = table(runs, raw)
        write("klt_stores", config, {"raw_bytes_per_token": raw} | found, args.out, show=False)

    for seed in map(int, args.seeds.split(",")):
        for name in names:
            if any((r["codec"], r["seed"]) == (name, seed) for r in runs):
                continue
            if time.monotonic() - STARTED + longest > args.seconds:
                say("no time for", name, seed)
                continue
            began = time.monotonic()
            states = exact if name == "exact" else decoded.use(name)
            run = {"codec": name, "seed": seed, "tokens": corpus.tokens, **sizes[name]}
            runs.append(run | trainer.run(seed, states.aux, states.last))
            say(
                name,
                "seed",
                seed,
                "tau",
                round(runs[-1]["tau"], 4),
                f"{runs[-1]['train_seconds']:.1f} s",
            )
            longest = time.monotonic() - began if len(runs) > 1 else 0.0
            keep()
    if args.speed_steps:
        if trainer.batches is None:
            trainer.run(0, exact.aux, exact.last)
        again = statistics.median
        for name in ["memory", *names, *reversed(names), "memory"]:
            speeds = found.setdefault("speed", {}).setdefault(name, [])
            speeds.append(speed(args, trainer, None if name == "memory" else store(args, name)))
            say(
                "speed",
                name,
                json.dumps(speeds[-1]),
                "median ms",
                round(again(s["ms"] for s in speeds), 1),
            )
            keep()
    keep()
    for row in found["table"]:
        print("TABLE", json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
